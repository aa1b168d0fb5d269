"""On-policy distillation: a student writes, and learns what its teacher thinks of every token.

The loss is KL(student || teacher) over the whole vocabulary, from hidden states, without logits.

python examples/distillation.py
"""

import tiny
import torch

from tdpo_ext import linear_token_divergences

student = tiny.language_model()
teacher = tiny.language_model(hidden_size=48)  # of the same vocabulary

# A teacher that writes praise. Use your own instead.
pairs = tiny.tokenized_preferences()
praise = torch.tensor([pair["prompt_ids"] + pair["chosen_ids"] for pair in pairs])
optimizer = torch.optim.AdamW(teacher.parameters(), lr=1e-2)
for _ in range(20):
    teacher(input_ids=praise, labels=praise).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
teacher.requires_grad_(False)

prompts = torch.tensor([pair["prompt_ids"] for pair in pairs])
optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
for step in range(40):
    tokens = student.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=True, max_new_tokens=3
    )
    # The hidden states at t give the distribution of token t + 1. Those that the student has
    # written count, and padding after its end does not.
    mask = tokens[:, 1:] != student.config.pad_token_id
    mask[:, : prompts.shape[1] - 1] = False
    found = linear_token_divergences(
        student.model(tokens).last_hidden_state[:, :-1],
        student.lm_head.weight,
        teacher.model(tokens).last_hidden_state[:, :-1],
        teacher.lm_head.weight,
        mask=mask,
        outputs=("reverse_kl", "policy_entropy"),
    )
    loss = found.reverse_kl.sum() / mask.sum()  # other outputs may be part of the loss too
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0:
        print({"entropy": round((found.policy_entropy.sum() / mask.sum()).item(), 4)})
    print(f"step {step}: loss {loss.item():.4f}")
print("the student writes:", tiny.tokenizer().decode(tokens[0]))
