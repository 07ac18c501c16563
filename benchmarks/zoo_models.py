"""Models of the zoo: the smallest of each timm family, and small models of transformers."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

Made = tuple[str, nn.Module, Any]
CACHE = Path(__file__).parent / "timm_smallest.json"
"""Cache of the smallest model of each family, computed with one version of timm."""


def _smallest() -> dict[str, str]:
    """Return the model with the fewest parameters of each timm module."""
    import timm

    if CACHE.exists():
        known = json.loads(CACHE.read_text())
        if known["timm"] == timm.__version__:
            return dict(known["models"])
    models = {}
    for family in timm.list_modules():
        sizes = {}
        for name in timm.list_models(module=family):
            try:
                with torch.device("meta"), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    sizes[name] = sum(p.numel() for p in timm.create_model(name).parameters())
            except Exception:  # some models cannot be built on the meta device
                continue
        if sizes:
            models[family] = min(sizes, key=lambda name: (sizes[name], name))
        elif names := timm.list_models(module=family):
            models[family] = names[0]
    CACHE.write_text(json.dumps({"timm": timm.__version__, "models": models}, indent=1) + "\n")
    return models


def make_timm(name: str) -> Made:
    """Return the name of a timm model, the model with random weights, and an input."""
    import timm

    model = timm.create_model(name, pretrained=False)
    config = model.pretrained_cfg
    size = config.get("min_input_size") or config["input_size"]
    if config.get("fixed_input_size"):
        size = config["input_size"]
    elif min(size[1:]) > 320:  # a larger input would take half a minute
        size = (size[0], 224, 224)
    return name, model, torch.randn(1, *size)


def timm_models() -> Iterator[tuple[str, Callable[[], Made]]]:
    """Yield each family and a function that builds its smallest model."""
    for family, name in _smallest().items():
        yield family, functools.partial(make_timm, name)


_SMALL: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
_GPT: dict[str, Any] = {
    "vocab_size": 101, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
}  # fmt: skip
_ENCODER_DECODER: dict[str, Any] = {
    "vocab_size": 101,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
}
_GROUPED = {**_SMALL, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "bert": ("BertConfig", "BertForSequenceClassification", _SMALL, "text"),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", _SMALL, "text"),
    "distilbert": (
        "DistilBertConfig",
        "DistilBertForSequenceClassification",
        {"vocab_size": 101, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
        "text",
    ),
    "albert": (
        "AlbertConfig",
        "AlbertForMaskedLM",
        {**_SMALL, "embedding_size": 16},
        "text",
    ),  # fmt: skip
    "electra": (
        "ElectraConfig",
        "ElectraForPreTraining",
        {**_SMALL, "embedding_size": 16},
        "text",
    ),  # fmt: skip
    "deberta-v2": (
        "DebertaV2Config",
        "DebertaV2ForSequenceClassification",
        {**_SMALL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        "text",
    ),
    "mpnet": ("MPNetConfig", "MPNetForMaskedLM", _SMALL, "text"),
    "modernbert": ("ModernBertConfig", "ModernBertForMaskedLM", {**_SMALL, **_IDS}, "text"),
    "xlnet": (
        "XLNetConfig",
        "XLNetForSequenceClassification",
        {"vocab_size": 101, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
        "text",
    ),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _GPT, "text"),
    "gpt-neo": (
        "GPTNeoConfig",
        "GPTNeoForCausalLM",
        {
            "vocab_size": 101,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        "text",
    ),
    "gptj": ("GPTJConfig", "GPTJForCausalLM", {**_GPT, "rotary_dim": 4}, "text"),
    "gpt-neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {**_SMALL, **_IDS}, "text"),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {**_SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32, **_IDS},
        "text",
    ),
    "bloom": (
        "BloomConfig",
        "BloomForCausalLM",
        {"vocab_size": 101, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        "text",
    ),  # fmt: skip
    "llama": ("LlamaConfig", "LlamaForCausalLM", _GROUPED, "text"),
    "mistral": ("MistralConfig", "MistralForCausalLM", _GROUPED, "text"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _GROUPED, "text"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _GROUPED, "text"),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", _GROUPED, "text"),
    "phi": ("PhiConfig", "PhiForCausalLM", {**_SMALL, **_IDS}, "text"),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
        "text",
    ),  # fmt: skip
    "mamba": (
        "MambaConfig",
        "MambaForCausalLM",
        {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
        "text",
    ),  # fmt: skip
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {
            "vocab_size": 101,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        "both",
    ),  # fmt: skip
    "bart": ("BartConfig", "BartForConditionalGeneration", _ENCODER_DECODER, "both"),
    "marian": (
        "MarianConfig",
        "MarianMTModel",
        {**_ENCODER_DECODER, "pad_token_id": 0, "decoder_start_token_id": 0},
        "both",
    ),  # fmt: skip
    "vit": (
        "ViTConfig",
        "ViTForImageClassification",
        {**_SMALL, "image_size": 32, "patch_size": 8},
        "image",
    ),  # fmt: skip
    "swin": (
        "SwinConfig",
        "SwinForImageClassification",
        {
            "image_size": 32,
            "patch_size": 4,
            "embed_dim": 16,
            "depths": [1, 1],
            "num_heads": [2, 4],
            "window_size": 4,
        },
        "image",
    ),  # fmt: skip
    "segformer": (
        "SegformerConfig",
        "SegformerForImageClassification",
        {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]},
        "image64",
    ),
    "clip": (
        "CLIPConfig",
        "CLIPModel",
        {
            "text_config": {**_SMALL, **_IDS},
            "vision_config": {**_SMALL, "image_size": 32, "patch_size": 8},
            "projection_dim": 16,
        },
        "text+image",
    ),
    "wav2vec2": (
        "Wav2Vec2Config",
        "Wav2Vec2ForSequenceClassification",
        {
            **_SMALL,
            "conv_dim": [16, 16],
            "conv_kernel": [10, 3],
            "conv_stride": [5, 2],
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 8,
            "num_conv_pos_embedding_groups": 4,
            "apply_spec_augment": False,
        },
        "sound",
    ),  # fmt: skip
    "whisper": (
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        {
            **_ENCODER_DECODER,
            "num_mel_bins": 8,
            "max_source_positions": 16,
            "max_target_positions": 64,
            "decoder_start_token_id": 1,
            **_IDS,
        },
        "mel",
    ),  # fmt: skip
}
"""Configuration class, model class, configuration and kind of input by architecture."""


def _inputs(kind: str) -> dict[str, torch.Tensor]:
    """Return the keyword arguments of a forward pass, drawn from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 101, (1, 12), generator=generator)
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    image = {"pixel_values": torch.randn(1, 3, 32, 32, generator=generator)}
    return {
        "text": text,
        "both": {**text, "decoder_input_ids": ids[:, :6]},
        "image": image,
        "image64": {"pixel_values": torch.randn(1, 3, 64, 64, generator=generator)},
        "text+image": {**text, **image},
        "sound": {"input_values": torch.randn(1, 400, generator=generator)},
        "mel": {
            "input_features": torch.randn(1, 8, 32, generator=generator),
            "decoder_input_ids": ids[:, :6],
        },
    }[kind]


def make_transformer(name: str) -> Made:
    """Return the class name of a small transformers model, the model, and its inputs."""
    import transformers

    config_class, model_class, values, kind = TRANSFORMERS[name]
    config = getattr(transformers, config_class)(**values)
    config.use_cache = False
    model = getattr(transformers, model_class)(config)
    return model_class, model, _inputs(kind)


def transformers_models() -> Iterator[tuple[str, Callable[[], Made]]]:
    """Yield each architecture and a function that builds it."""
    for name in TRANSFORMERS:
        yield name, functools.partial(make_transformer, name)
