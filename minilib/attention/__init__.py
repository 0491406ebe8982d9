"""Attention: every variant behind one signature, one layer that uses them, and ways to act on it from outside."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submod_attrs={
        "causal": ["CausalAttention", "KVCache"],
        "cross": ["CrossAttention"],
        "functional": ["attention_weights", "full_attention", "naive_attention"],
        "intervene": [
            "attention_modules",
            "attention_processor",
            "patch_attention",
            "record_attention",
            "replace_attention_weights",
            "replace_keys_values",
            "reweight_attention",
            "scale_heads",
        ],
        "joint": ["JointAttention", "RotaryAttention", "joint_ids", "joint_mask"],
        "key_values": ["patch_keys_values", "record_keys_values"],
        "module": ["Attention", "AttentionLayer"],
        "pooled": ["PooledLocalAttention", "pool_grid"],
        "registry": [
            "ATTENTION",
            "Attend",
            "Case",
            "Variant",
            "attention_variants",
            "get_attention",
            "make_attention_layer",
            "register_attention",
        ],
        "replace": ["Replacement", "replace_attention"],
        "rope": ["RotaryEmbedding", "apply_rotary", "grid_ids", "interpolated"],
        "rope_scaling": [
            "axis_factors",
            "ntk_aware",
            "position_interpolation",
            "yarn",
            "yarn_attention_scale",
        ],
    },
)
