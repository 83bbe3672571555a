"""Text-only causal language models of transformers, in the layouts of LLaMA and of GPT-2."""

from __future__ import annotations

from memfit.families.base import Family

# Instantiated on the meta device with transformers 5.23 by tests/unit/test_families_models.py; the classes are
# <Name>ForCausalLM. Mixtures of experts are not among them.
LLAMA_LIKE = (
    *("llama", "mistral", "ministral", "qwen2", "qwen3", "qwen3_5_text", "minicpm3", "gemma", "gemma2"),
    *("gemma3_text", "phi", "phi3", "olmo", "olmo2", "olmo3", "smollm3", "granite", "cohere", "cohere2"),
    *("starcoder2", "stablelm", "glm", "glm4", "exaone4", "ernie4_5", "helium", "nemotron", "seed_oss"),
)

# Used when the tokenizer brings no chat template (a base model): plain roles, the end mark after each answer.
PLAIN_TEMPLATE = (
    "{{ bos_token if bos_token is defined else '' }}"
    "{%- for message in messages %}{{ message['role'] | capitalize + ':\\n' + message['content'] }}"
    "{%- if message['role'] == 'assistant' %}{{ eos_token }}{%- endif %}{{ '\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ 'Assistant:\\n' }}{%- endif %}"
)

FAMILY = Family(
    name="text",
    model_types=LLAMA_LIKE,
    auto_class="AutoModelForCausalLM",
    parts=(("model.", "language"), ("lm_head.", "head")),
    blocks={"language": "model.layers."},
    lora_targets=(
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        # phi3, glm: fused; phi, nemotron and starcoder2: their own names
        *("qkv_proj", "gate_up_proj", "dense", "fc1", "fc2", "c_fc", "c_proj"),
        # minicpm3: latent attention; qwen3_5_text: linear attention
        *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
        *("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"),
    ),
    chat_template=PLAIN_TEMPLATE,
    sources={"parts": "transformers.models.llama.modeling_llama:LlamaForCausalLM and its like"},
)

GPT2 = Family(
    name="text-gpt2",
    model_types=("gpt2",),
    auto_class="AutoModelForCausalLM",
    parts=(("transformer.", "language"), ("lm_head.", "head")),
    blocks={"language": "transformer.h."},
    lora_targets=("c_attn", "c_proj", "c_fc"),
    chat_template=PLAIN_TEMPLATE,
    sources={"parts": "transformers.models.gpt2.modeling_gpt2:GPT2LMHeadModel"},
)
