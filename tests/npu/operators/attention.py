"""Attention over paged keys and values, for a batch of new tokens. Must not know who fills the pages."""

from __future__ import annotations

import functools

import torch

from tests.npu.operators.contract import Rule, Unsupported, contiguous, modelled, not_empty

NAME = "npu_fused_infer_attention_score_v2"
INT_MAX = 2147483647
COMPRESSED = 2048  # side of the one mask that sparse modes 2, 3 and 4 share

QUERY = Rule(
    NAME,
    "query: Tensor类型, attention结构的Query输入, 数据类型支持float16、bfloat16、int8, "
    "不支持非连续的Tensor",
)
KEY = Rule(NAME, "key: Tensor类型, attention结构的Key输入, 不支持非连续的Tensor")
VALUE = Rule(NAME, "value: Tensor类型, attention结构的Value输入, 不支持非连续的Tensor")
PAGED_DTYPE = Rule(
    NAME,
    "page attention的使能必要条件是block_table存在且有效, 同时key、"
    "value是按照block_table中的索引在一片连续内存中排布, 支持key、value数据类型为float16、"
    "bfloat16、int8.",
)
TND = Rule(
    NAME, "TND(不支持tensorlist、pse、page attention、伪量化、全量化、后量化, 综合约束请见约束说明)"
)
LAYOUTS = Rule(NAME, "BSH-(B,Q_S,H), BSND-(B,Q_S,Q_N,D), BNSD-(B,Q_N,Q_S,D)")
RATIO = Rule(NAME, "num_query_heads与num_key_value_heads的比值不能大于64")
SIZES = Rule(
    NAME, "支持N轴小于等于256, 支持D轴小于等于512; input_layout为BSH或者BSND时, 要求N*D小于65535."
)
ALIGNMENT = Rule(NAME, "输入类型全为float16、bfloat16时, D轴需16对齐.")
MASK_DTYPE = Rule(
    NAME,
    "数据类型支持bool、int8和uint8. 不支持非连续的Tensor, 数据格式支持ND. "
    "如果不使用该功能可传入None.",
)
MASK_COMPRESSED = Rule(
    NAME,
    "sparse_mode=2、3、4时, atten_mask的shape需要为(S, S)或(1, S, S)或(1, 1, S, S), "
    "其中S的值需要固定为2048, 且需要用户保证传入的atten_mask为下三角, "
    "不传入atten_mask或者传入的shape不正确报错.",
)
MASK_FULL = Rule(NAME, "支持shape传入(1,Q_S,KV_S)、(B,1,Q_S,KV_S)、(1,1,Q_S,KV_S)。")
MASK_DECODE = Rule(NAME, "Q_S为1可支持传入(B,KV_S)，Q_S大于1时可支持传入(Q_S,KV_S)。")
MASK_WIDTH = Rule(
    NAME, "page attention使能场景下, 以下场景输入需满足KV_S>=maxBlockNumPerSeq*blockSize:"
)
MASK_VALUE = Rule(
    "npu_fusion_attention",
    "取值为1(或True)代表该位不参与计算(被遮蔽), 取值为0(或False)代表该位参与计算(被保留)",
)
MASK_ROW = Rule(NAME, "当计算过程中“参与计算的mask部分”存在某整行全为1的情况时, 精度可能会有损失.")
BAND = Rule(
    "npu_fusion_attention",
    "sparse_mode为4时, 代表band场景, 即计算pre_tockens和next_tockens之间的部分, 参数起点为右下角",
)
MODES = Rule(NAME, "参数sparse_mode当前仅支持值为0、1、2、3、4的场景, 取其它值时会报错.")
MODE_DECODE = Rule(
    NAME,
    "sparse_mode: 整型, 表示sparse的模式. 数据类型支持int64. Q_S为1且不带rope输入时该参数无效.",
)
PRECISION = Rule(NAME, "inner_precise: 整型, 一共4种模式: 0、1、2、3.")
PRECISION_DECODE = Rule(NAME, "Q_S为1时该参数仅支持innerPrecise为0和1.")
BLOCKS_PREFILL = Rule(
    NAME, "在使能page attention场景下, block_size最小为128, 最大为512, 且要求是128的倍数."
)
BLOCKS_DECODE = Rule(NAME, "key、value输入类型为float16、bfloat16时需要16对齐")
BLOCKS_MOST = Rule("npu_fused_infer_attention_score", "block_size需要传入非0值，且最大不超过512")
CACHE_H = Rule(
    NAME,
    "当输入kv cache排布格式为(blocknum, blocksize, H), 且KV_N*D超过65535时, 受硬件指令约束, "
    "会被拦截报错.",
)
CACHE_LAYOUT = Rule(
    NAME,
    "当query的input_layout为BNSD、TND时, kv cache排布支持(blocknum, blocksize, H)和(blocknum, "
    "KV_N, blocksize, D)两种格式, 当query的input_layout为BSH、BSND时, kv "
    "cache排布只支持(blocknum, blocksize, H)一种格式.",
)
CACHE_SHAPES = Rule(NAME, "且key和value的shape需保证一致.")
CACHE_BLOCKS = Rule(
    NAME, "blocknum不能小于根据actual_seq_kvlen和blockSize计算的每个batch的block数量之和."
)
CACHE_INT32 = Rule(NAME, "参数key、value各自对应tensor的shape所有维度相乘不能超过int32的表示范围.")
TABLE_DTYPE = Rule(NAME, "block_table: Tensor类型, 数据类型支持int32.")
TABLE_SHAPE = Rule(
    NAME,
    "page attention场景下, block_table必须为二维, 第一维长度需等于B, "
    "第二维长度不能小于maxBlockNumPerSeq",
)
TABLE_BLOCKS = Rule(NAME, "当前不会对blockid的合法性进行校验, 需用户自行保证.")
KV_LENGTHS = Rule(NAME, "page attention场景下, 必须传入actual_seq_kvlen.")
KV_LIMIT = Rule(
    NAME, "支持B轴小于等于65536, 支持N轴小于等于256, 支持S轴小于等于262144, 支持D轴小于等于512."
)
LENGTHS = Rule(NAME, "传入长度大于等于Batch时取seqlen的前Batch个数. 其他长度不支持.")
Q_LENGTHS = Rule(
    NAME, "该入参中每个batch的有效seqlen应该不大于query中对应batch的seqlen, Q_S为1时该参数无效."
)


def npu_fused_infer_attention_score_v2(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    atten_mask: torch.Tensor | None = None,
    actual_seq_qlen: list[int] | None = None,
    actual_seq_kvlen: list[int] | None = None,
    block_table: torch.Tensor | None = None,
    num_query_heads: int = 1,
    num_key_value_heads: int = 0,
    softmax_scale: float = 1.0,
    pre_tokens: int = INT_MAX,
    next_tokens: int = INT_MAX,
    input_layout: str = "BSH",
    sparse_mode: int = 0,
    block_size: int = 0,
    inner_precise: int = 0,
    return_softmax_lse: bool = False,
    **others: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(attention in the shape of `query`, log of the softmax sums [B, N, Q_S, 1] fp32, or [0.0] where not asked for).

    `key` and `value` are pages, [num_blocks, block_size, KV_N * D], or for BNSD also [num_blocks, KV_N, block_size, D];
    `block_table` [B, max_blocks] int32 names each sequence's pages in order. Rows past a sequence's length, about
    which the documentation is silent, come out as NaN.
    """
    modelled(NAME, **others)
    TND.undocumented(
        input_layout not in ("TND", "NTD_TND", "TND_NTD"),
        f"pages with input_layout {input_layout!r}",
    )
    if input_layout not in ("BSH", "BSND", "BNSD"):
        raise Unsupported(f"{NAME}: input_layout {input_layout!r} not modelled")
    if block_table is None:
        raise Unsupported(f"{NAME}: keys and values without pages not modelled")
    not_empty(NAME, query=query, key=key, block_table=block_table)
    heads = _by_head(query, input_layout, num_query_heads)
    batch, _, length, size = heads.shape
    num_kv_heads = num_key_value_heads or num_query_heads
    _check_heads(query, key, value, (num_query_heads, num_kv_heads, size), input_layout)
    decode = length == 1
    blocks = f"block_size is {block_size}"
    if decode:
        BLOCKS_MOST.demand(0 < block_size <= 512, blocks)
        BLOCKS_DECODE.demand(block_size % 16 == 0, blocks)
        PRECISION_DECODE.demand(inner_precise in (0, 1), f"inner_precise is {inner_precise}")
        MODE_DECODE.undocumented(
            sparse_mode == 0, f"sparse_mode is {sparse_mode} for one token a sequence"
        )
    else:
        BLOCKS_PREFILL.demand(128 <= block_size <= 512 and block_size % 128 == 0, blocks)
        PRECISION.demand(inner_precise in (0, 1, 2, 3), f"inner_precise is {inner_precise}")
    keys, values = (
        _pages(cache, (num_kv_heads, block_size, size), input_layout) for cache in (key, value)
    )
    KV_LENGTHS.demand(actual_seq_kvlen is not None, "actual_seq_kvlen is not given")
    kv_lengths = _lengths(actual_seq_kvlen or [0], batch)
    q_lengths = [1] * batch if decode else _lengths(actual_seq_qlen or [length], batch)
    Q_LENGTHS.demand(max(q_lengths) <= length, f"actual_seq_qlen {q_lengths} for rows of {length}")
    KV_LIMIT.demand(
        not decode or max(kv_lengths) <= 262144, f"actual_seq_kvlen has {max(kv_lengths)}"
    )
    table = _check_table(block_table, batch, kv_lengths, block_size, key.shape[0])
    hidden = _Hidden(
        atten_mask,
        sparse_mode,
        (pre_tokens, next_tokens),
        (batch, length, table.shape[1] * block_size),
    )

    out = torch.full(heads.shape, torch.nan)
    lse = torch.full((*heads.shape[:3], 1), torch.nan)
    for index, (q_length, kv_length) in enumerate(zip(q_lengths, kv_lengths, strict=True)):
        if not q_length or not kv_length:
            continue
        pages = table[index, : -(-kv_length // block_size)].long()
        k, v = (
            cache[pages].transpose(0, 1).flatten(1, 2)[:, :kv_length].float()
            for cache in (keys, values)
        )
        k, v = (rows.repeat_interleave(num_query_heads // num_kv_heads, 0) for rows in (k, v))
        scores = heads[index, :, :q_length].float() @ k.transpose(1, 2) * softmax_scale
        dropped = hidden.of(index, q_length, kv_length)
        whole = bool(dropped.all(-1).any())
        MASK_ROW.undocumented(not whole, f"a row of sequence {index} attends to nothing")
        scores = scores.masked_fill(dropped, -torch.inf)
        out[index, :, :q_length] = scores.softmax(-1) @ v
        lse[index, :, :q_length] = scores.logsumexp(-1, keepdim=True)
    result = out if input_layout == "BNSD" else out.transpose(1, 2)
    return (
        result.reshape(query.shape).to(query.dtype).contiguous(),
        lse if return_softmax_lse else torch.zeros(1),
    )


class _Hidden:
    """Which positions a row must not attend to, from the mask argument and the sparse mode."""

    def __init__(
        self,
        mask: torch.Tensor | None,
        mode: int,
        band: tuple[int, int],
        shape: tuple[int, int, int],
    ) -> None:
        """`shape` is (batch, rows of a sequence, positions its pages hold)."""
        MODES.demand(mode in (0, 1, 2, 3, 4), f"sparse_mode is {mode}")
        if mode == 1:
            raise Unsupported(f"{NAME}: sparse_mode 1 not modelled")
        self._mode, self._band, self._mask = mode, band, None
        if mask is not None:
            allowed = mask.dtype in (torch.bool, torch.int8, torch.uint8) and mask.is_contiguous()
            MASK_DTYPE.demand(allowed, f"atten_mask is {mask.dtype}, strides {mask.stride()}")
        if mode:
            self._check_compressed(mask)
            BAND.undocumented(mode != 4 or min(band) >= 0, f"pre_tokens, next_tokens are {band}")
        elif mask is not None:
            if band != (INT_MAX, INT_MAX):
                raise Unsupported(
                    f"{NAME}: a full mask with pre_tokens, next_tokens {band} not modelled"
                )
            self._mask = self._full(mask.bool(), *shape)

    @staticmethod
    def _check_compressed(mask: torch.Tensor | None) -> None:
        sides = (COMPRESSED, COMPRESSED)
        shapes = (sides, (1, *sides), (1, 1, *sides))
        MASK_COMPRESSED.demand(
            mask is not None and mask.shape in shapes, "atten_mask is not the compressed one"
        )
        assert mask is not None
        same = torch.equal(mask.view(sides).bool(), _upper_triangle())
        MASK_COMPRESSED.demand(same, "atten_mask hides the wrong triangle")

    @staticmethod
    def _full(mask: torch.Tensor, batch: int, length: int, capacity: int) -> torch.Tensor:
        """The mask as [batch, rows, positions]."""
        found, width = f"atten_mask is {list(mask.shape)}", mask.shape[-1]
        if length == 1 and mask.dim() == 2:
            MASK_DECODE.demand(mask.shape[0] == batch, found)
            mask = mask.view(batch, 1, width)
        elif mask.dim() == 4:
            MASK_FULL.demand(mask.shape[:3] in ((batch, 1, length), (1, 1, length)), found)
            mask = mask.squeeze(1)
        else:
            MASK_FULL.demand(mask.shape[:2] == (1, length), found)
        MASK_WIDTH.demand(width >= capacity, f"{found}, the pages hold {capacity}")
        return mask.expand(batch, length, width)

    def of(self, index: int, q_length: int, kv_length: int) -> torch.Tensor:
        """[q_length, kv_length], True where sequence `index` must not attend."""
        if self._mask is not None:
            return self._mask[index, :q_length, :kv_length]
        # The distance of a position from the diagonal: the upper left corner's in mode 2, else the lower right's.
        rows = torch.arange(q_length)[:, None] + (0 if self._mode == 2 else kv_length - q_length)
        ahead = torch.arange(kv_length)[None] - rows
        match self._mode:
            case 0:
                return torch.zeros(q_length, kv_length, dtype=torch.bool)
            case 4:
                return (ahead > self._band[1]) | (-ahead > self._band[0])
            case _:
                return ahead > 0


@functools.cache
def _upper_triangle() -> torch.Tensor:
    return torch.ones(COMPRESSED, COMPRESSED, dtype=torch.bool).triu(1)


def _by_head(query: torch.Tensor, layout: str, num_heads: int) -> torch.Tensor:
    """`query` as [B, N, S, D]."""
    found = f"query is {list(query.shape)} for {num_heads} heads in {layout}"
    if layout == "BSH":
        LAYOUTS.demand(query.dim() == 3 and query.shape[2] % num_heads == 0, found)
        return query.reshape(*query.shape[:2], num_heads, -1).transpose(1, 2)
    heads = query.transpose(1, 2) if layout == "BSND" and query.dim() == 4 else query
    LAYOUTS.demand(heads.dim() == 4 and heads.shape[1] == num_heads, found)
    return heads


def _check_heads(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    shape: tuple[int, int, int],
    layout: str,
) -> None:
    """Dtypes, strides and sizes; `shape` is (query heads, key heads, head size)."""
    num_heads, num_kv_heads, size = shape
    for rule, tensor in ((QUERY, query), (KEY, key), (VALUE, value)):
        floats = tensor.dtype in (torch.float16, torch.bfloat16)
        rule.demand(floats and tensor.is_contiguous(), f"{tensor.dtype}, strides {tensor.stride()}")
        PAGED_DTYPE.undocumented(
            tensor.dtype == query.dtype, f"query is {query.dtype}, pages {tensor.dtype}"
        )
    RATIO.demand(
        num_heads % num_kv_heads == 0 and num_heads // num_kv_heads <= 64,
        f"{num_heads} to {num_kv_heads}",
    )
    found = f"{num_heads} heads of {size}"
    SIZES.demand(num_heads <= 256 and size <= 512, found)
    SIZES.demand(layout == "BNSD" or num_heads * size < 65535, found)
    ALIGNMENT.demand(size % 16 == 0, found)
    CACHE_SHAPES.demand(
        key.shape == value.shape, f"key {list(key.shape)}, value {list(value.shape)}"
    )
    CACHE_INT32.demand(key.numel() <= INT_MAX, f"key {list(key.shape)}")


def _pages(cache: torch.Tensor, shape: tuple[int, int, int], layout: str) -> torch.Tensor:
    """`cache` as [num_blocks, KV_N, block_size, D]; `shape` is (KV_N, block_size, D)."""
    num_heads, block_size, size = shape
    found = f"pages of {list(cache.shape)} for {num_heads} heads of {size}, block_size {block_size}, {layout}"
    if cache.dim() == 4:
        CACHE_LAYOUT.demand(layout == "BNSD" and cache.shape[1:] == shape, found)
        return cache
    CACHE_LAYOUT.demand(
        cache.dim() == 3 and cache.shape[1:] == (block_size, num_heads * size), found
    )
    CACHE_H.demand(num_heads * size <= 65535, found)
    return cache.reshape(-1, block_size, num_heads, size).transpose(1, 2)


def _lengths(lengths: list[int], batch: int) -> list[int]:
    """One length for each sequence."""
    LENGTHS.demand(
        len(lengths) == 1 or len(lengths) >= batch, f"{len(lengths)} lengths for {batch} sequences"
    )
    LENGTHS.demand(min(lengths) >= 0, f"lengths {lengths}")
    return list(lengths) * batch if len(lengths) == 1 else list(lengths[:batch])


def _check_table(
    table: torch.Tensor, batch: int, kv_lengths: list[int], block_size: int, num_blocks: int
) -> torch.Tensor:
    """The table, every entry that is used naming a page."""
    used = [-(-length // block_size) for length in kv_lengths]
    found = (
        f"block_table is {table.dtype} {list(table.shape)} for {batch} sequences of {kv_lengths}"
    )
    TABLE_DTYPE.demand(table.dtype == torch.int32, found)
    contiguous(NAME, block_table=table)
    TABLE_SHAPE.demand(
        table.dim() == 2 and table.shape[0] == batch and table.shape[1] >= max(used), found
    )
    CACHE_BLOCKS.demand(num_blocks >= sum(used), f"{num_blocks} pages; {found}")
    for row, count in zip(table, used, strict=True):
        valid = (row[:count] >= 0) & (row[:count] < num_blocks)
        TABLE_BLOCKS.demand(
            bool(valid.all()), f"a page of {row[:count].tolist()} is not among {num_blocks}"
        )
    return table
