"""``transformers.Trainer`` with the TDPO loss; accumulation, evaluation and logging are its own.

python examples/transformers_trainer.py
"""

import tempfile

import tiny
import transformers

from tdpo_ext import LinearTDPOLoss
from tdpo_ext.integrations.transformers import PreferenceCollator, TDPOTrainer

examples = tiny.tokenized_preferences()
with tempfile.TemporaryDirectory() as folder:
    trainer = TDPOTrainer(
        tiny.language_model(),  # the reference is a frozen copy of it
        transformers.TrainingArguments(
            folder,
            per_device_train_batch_size=3,
            gradient_accumulation_steps=1,
            num_train_epochs=20,
            learning_rate=1e-3,
            logging_steps=1,
            eval_strategy="epoch",
            report_to="none",
        ),
        loss=LinearTDPOLoss(beta=0.1, alpha=0.5),
        train_dataset=examples,
        eval_dataset=examples,
        data_collator=PreferenceCollator(pad_token_id=0),
    )
    trainer.train()

losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
for step, loss in enumerate(losses):
    print(f"step {step}: loss {loss:.4f}")
