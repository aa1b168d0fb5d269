"""The reference's hidden states on disk, so that training needs no reference model in memory.

A reference that never changes has the same hidden states in every epoch. Those before its head, in
their own dtype, are exact and far smaller than its logits; ``linear_tdpo_loss`` takes them together
with the reference's head, which alone stays in memory. A sequence is found by its tokens, so the
order of a data set and padding do not matter.

    fingerprint = {"model": "...", "parameters": "...", "tokenizer": "..."}
    with ReferenceCacheWriter(folder, fingerprint) as writer:
        for ids in sequences:
            writer.add(sequence_key(ids), hidden_states_of(ids))
        writer.finish()
    cache = ReferenceCache(folder, fingerprint)
    hidden = cache.read([sequence_key(ids)])[0]              # [tokens, H]

Each writing process has two files of its own in the folder, to which it only appends: the hidden
states of a sequence, then one record of 32 bytes with the sequence's key, its length and a CRC-32
over all of it. So the sequences that were complete when a process died are kept, and writing goes
on after them. ``description.json`` holds the fingerprint of the reference and the number of
finished records; it is replaced as a whole.

Reading takes only the bytes of the rows asked for, by ``pread``; the operating system keeps in
memory what is read often, as it does for a mapped file. A mapped file would end the process with
SIGBUS where a file was cut or a disk fails; ``pread`` gives an error with a message. Every read
checks the CRC-32.
"""

from tdpo_ext.integrations.reference_cache.files import sequence_key
from tdpo_ext.integrations.reference_cache.reader import ReferenceCache
from tdpo_ext.integrations.reference_cache.writer import ReferenceCacheWriter

__all__ = ["ReferenceCache", "ReferenceCacheWriter", "sequence_key"]
