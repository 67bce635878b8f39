"""Writing new keys and values into the pages of a KV cache. Must not know who owns a page."""

from __future__ import annotations

import torch

from tests.npu.operators.contract import Rule, Unsupported, modelled, not_empty

NAME = "npu_scatter_pa_kv_cache"
DTYPES = (torch.float16, torch.float32, torch.bfloat16, torch.int8)
STRIDES = Rule(NAME, "输入参数不支持非连续；")
SAME = Rule(NAME, "key、value、key_cache、value_cache的数据类型必须一致；")
DTYPE = Rule(
    NAME, "数据类型支持float16、float、bfloat16、int8、uint8、int16、uint16、int32、uint32"
)
MODE = Rule(
    NAME,
    "当传None或'Norm'时，仅支持ND内存排布格式。当传入'PA_NZ'时，仅支持NZ内存排布格式，"
    "默认值为'PA_NZ'。",
)
KEY = Rule(NAME, "key:[batch*seq_len, num_head, k_head_size]")
CACHE = Rule(NAME, "keyCache:[num_blocks, block_size, num_head, k_head_size]")
SLOTS = Rule(NAME, "slotMapping:[batch * seq_len]")
SLOT_DTYPE = Rule(NAME, "表示每个token key或value在cache中的存储偏移，数据类型支持int32和int64")
SLOT_RANGE = Rule(
    NAME,
    "slot_mapping的值范围[0,num_blocks*block_size-1]，且slot_mapping内的元素值保证不重复，"
    "重复时不保证正确性；",
)
LEADING = Rule(NAME, "当key和value都是3维，则key和value的前两维shape必须相同；")


def npu_scatter_pa_kv_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    compress_lens: torch.Tensor | None = None,
    compress_seq_offsets: torch.Tensor | None = None,
    seq_lens: torch.Tensor | None = None,
    cache_mode: str | None = "PA_NZ",
) -> None:
    """Write the rows of `key` and `value` [T, KV_N, D] to the slots `slot_mapping` [T] of the caches, in place.

    The caches are [num_blocks, block_size, KV_N, D]; a slot is block * block_size + place in the block.
    """
    modelled(
        NAME,
        compress_lens=compress_lens,
        compress_seq_offsets=compress_seq_offsets,
        seq_lens=seq_lens,
    )
    MODE.demand(cache_mode in (None, "Norm", "PA_NZ"), f"cache_mode is {cache_mode!r}")
    if cache_mode == "PA_NZ":
        raise Unsupported(f"{NAME}: cache_mode 'PA_NZ', which is the default, is not modelled")
    tensors = {"key": key, "value": value, "key_cache": key_cache, "value_cache": value_cache}
    for name, tensor in {**tensors, "slot_mapping": slot_mapping}.items():
        STRIDES.demand(tensor.is_contiguous(), f"{name} has strides {tensor.stride()}")
    SAME.demand(
        len({tensor.dtype for tensor in tensors.values()}) == 1,
        f"{[t.dtype for t in tensors.values()]}",
    )
    DTYPE.demand(key.dtype in DTYPES, f"key is {key.dtype}")
    not_empty(NAME, key=key, value=value)
    for name, rows, pages in (("key", key, key_cache), ("value", value, value_cache)):
        found = f"{name} is {list(rows.shape)}, its cache {list(pages.shape)}"
        KEY.demand(rows.dim() == 3, found)
        CACHE.demand(pages.dim() == 4 and pages.shape[2:] == rows.shape[1:], found)
    LEADING.demand(
        key.shape[:2] == value.shape[:2], f"key {list(key.shape)}, value {list(value.shape)}"
    )
    CACHE.demand(key_cache.shape[:2] == value_cache.shape[:2], "the caches differ in blocks")
    SLOT_DTYPE.demand(
        slot_mapping.dtype in (torch.int32, torch.int64), f"slots are {slot_mapping.dtype}"
    )
    SLOTS.demand(
        slot_mapping.shape == key.shape[:1],
        f"slots {list(slot_mapping.shape)}, key {list(key.shape)}",
    )
    slots = slot_mapping.long()
    limit = key_cache.shape[0] * key_cache.shape[1]
    SLOT_RANGE.demand(
        bool(((slots >= 0) & (slots < limit)).all()), f"a slot is outside [0, {limit})"
    )
    SLOT_RANGE.demand(len(set(slots.tolist())) == slots.numel(), "a slot is named twice")
    key_cache.flatten(0, 1)[slots] = key
    value_cache.flatten(0, 1)[slots] = value
