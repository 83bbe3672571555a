"""Tiny tokenizers with the real pipelines and the real names of special tokens, trained on a few lines of text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

# Enough to merge common letter pairs; bytes cover everything else.
CORPUS = [
    "What is written on this slip? Read the number, the date and the total.",
    "The picture shows three red squares and one blue circle.",
    '{"number": "1024", "date": "2024-05-17", "total": "38.50", "quantity": "3"}',
    "Answer with JSON only. How many are there? There are seven of them.",
    "你好，这张图片里有什么？请只用 JSON 回答。",
] * 3

# The pattern that Qwen's and Llama 3's tokenizers split words by (transformers.models.qwen2.tokenization_qwen2).
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
MINICPM_SPECIAL = ("<image>", "</image>", "<slice>", "</slice>", "<image_id>", "</image_id>")
LLAMA3_SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
VOCABULARY = 400


def byte_level(special: tuple[str, ...], plain: tuple[str, ...] = ()) -> Tokenizer:
    """Byte-level BPE as in Qwen and Llama 3. `plain` are added tokens that are not special (<think>)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=sorted(alphabet), show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    return tokenizer


def sentencepiece_like() -> Tokenizer:
    """BPE over whole characters with byte fallback, as in LLaMA 1 and 2 and so in LLaVA 1.5."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    # Without a split, merges would run over whole lines: train on words, then drop the split again.
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=True)
    ascii_corpus = [line for line in CORPUS if line.isascii()]
    trainer = trainers.BpeTrainer(vocab_size=len(tokens) + 150, special_tokens=tokens, show_progress=False)
    tokenizer.train_from_iterator(ascii_corpus, trainer)
    trained = json.loads(tokenizer.to_str())
    trained["pre_tokenizer"] = None
    trained["added_tokens"] = [entry for entry in trained["added_tokens"] if not entry["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(trained))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<image>", "<pad>")])
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path, settings: dict[str, Any], template: str) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"clean_up_tokenization_spaces": False, "model_max_length": 4096, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


# Chat templates that behave as the published ones do, as far as text and pictures go.
_CONTENT = (
    "{%- if message.content is string %}{{ message.content }}{%- else %}{%- for piece in message.content %}"
    "{%- if piece.type == 'image' %}{{ IMAGE }}{%- else %}{{ piece.text }}{%- endif %}{%- endfor %}{%- endif %}"
)
_CHATML = (
    "{%- for message in messages %}DEFAULT{{ '<|im_start|>' + message.role + '\\n' }}"
    + _CONTENT
    + "{{ '<|im_end|>\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)
MINICPM_TEMPLATE = _CHATML.replace("DEFAULT", "").replace("IMAGE", "'<|image_pad|>'")
# Qwen2.5-VL opens with a system turn of its own when there is none.
QWEN_VL_TEMPLATE = _CHATML.replace(
    "DEFAULT",
    "{%- if loop.first and message.role != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif %}",
).replace("IMAGE", "'<|vision_start|><|image_pad|><|vision_end|>'")
# Qwen3 opens the last answer with an empty thought and cuts thoughts out of answers.
QWEN3_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- set content = message.content %}
{%- if message.role == 'assistant' %}
{%- if '</think>' in content %}{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}
{%- if loop.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
{{- content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""
# Llama 3 strips what is said and marks every turn's end.
LLAMA3_TEMPLATE = (
    "{{ bos_token }}{%- for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}{%- if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
# LLaVA 1.5 on the hub: pictures first, then the words; no mark after an answer; {% generation %} around it.
LLAVA_TEMPLATE = (
    "{%- for message in messages %}"
    "{%- if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{%- endif %}"
    "{%- for piece in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{%- endfor %}"
    "{%- for piece in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{%- if message['role'] == 'assistant' %}{% generation %}{{ piece['text'] + ' ' }}{% endgeneration %}"
    "{%- else %}{{ piece['text'] + ' ' }}{%- endif %}{%- endfor %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{%- endif %}"
)
