"""TRL's DPOTrainer with the TDPO loss and LoRA: the reference is the model without adapters.

python examples/trl_lora.py
"""

import tempfile

import peft
import tiny
import torch

from tdpo_ext.integrations.trl import TDPOConfig, TDPOTrainer

with tempfile.TemporaryDirectory() as folder:
    trainer = TDPOTrainer(
        tiny.language_model(),
        args=TDPOConfig(
            folder,
            tdpo_variant="tdpo2",
            tdpo_alpha=0.5,
            # Scratch memory: if the logits of a pair fit, the head makes no product twice.
            tdpo_chunk_bytes=2**30,
            beta=0.1,
            per_device_train_batch_size=3,
            num_train_epochs=20,
            learning_rate=1e-2,  # large, since this model is tiny
            logging_steps=1,
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
        ),
        train_dataset=tiny.preferences(),  # prompt, chosen, rejected, as for DPO
        processing_class=tiny.tokenizer(),
        peft_config=peft.LoraConfig(r=8, target_modules="all-linear"),
    )
    trainer.train()

losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
for step, loss in enumerate(losses):
    print(f"step {step}: loss {loss:.4f}")
