"""The reference's hidden states on disk, so that training needs no reference model in memory.

A reference that never changes says the same about a token every epoch. Its hidden states before
the head, in their own dtype, are exact and far smaller than its logits; ``linear_tdpo_loss`` takes
them with the reference's head, which alone stays in memory. A sequence is found by its tokens, so
neither the order of a data set nor padding matters.

    fingerprint = {"model": "...", "parameters": "...", "tokenizer": "..."}
    with ReferenceCacheWriter(folder, fingerprint) as writer:
        for ids in sequences:
            writer.add(sequence_key(ids), hidden_states_of(ids))
        writer.finish()
    cache = ReferenceCache(folder, fingerprint)
    hidden = cache.read([sequence_key(ids)])[0]              # [tokens, H]

In the folder, each writing process has two files of its own, to which it only appends: hidden
states, and then one record of 32 bytes that says whose they are and has a CRC-32 over both. So
what was complete when a process died is kept, and writing goes on after it. ``description.json``
says what the cache is of, and which records are finished; it is replaced as a whole.

Reading takes the bytes of the rows asked for, by ``pread``; the operating system keeps what is
read often in memory, as it does for a mapped file. A mapped file would end the process with SIGBUS
where a file was cut or a disk fails; here it is an error with words. Every read checks the CRC-32.
"""

from tdpo_ext.integrations.reference_cache.files import sequence_key
from tdpo_ext.integrations.reference_cache.reader import ReferenceCache
from tdpo_ext.integrations.reference_cache.writer import ReferenceCacheWriter

__all__ = ["ReferenceCache", "ReferenceCacheWriter", "sequence_key"]
