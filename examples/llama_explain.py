"""What effopt does to a Llama of transformers, with random weights and its own spelling of attention."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import effopt

config = LlamaConfig(
    hidden_size=256,
    intermediate_size=688,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    vocab_size=1000,
)
config._attn_implementation = "eager"
model = LlamaForCausalLM(config).eval()
tokens = torch.randint(0, config.vocab_size, (1, 64))

with torch.no_grad():
    # "eager" leaves Inductor out, which is all that takes long. Without it the kernels are chosen as well.
    report = effopt.explain(model, tokens, use_cache=False, options={"lowering": "eager"})

print(report)
assert report.ops["attention"] == config.num_hidden_layers
report.to_html("llama_report.html")
print("llama_report.html shows one layer before and after")
