"""The reference of paged attention against a softmax per sequence in fp64, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.npu.operators.contract import ContractError, Undocumented, Unsupported, Violation

BLOCK = 128
MASK = torch.ones(2048, 2048, dtype=torch.bool).triu(1)

pytestmark = pytest.mark.usefixtures("npu_operators")


class Paged:
    """Sequences of (new tokens, context length), their keys and values scattered over pages in random order."""

    def __init__(
        self,
        lengths: list[tuple[int, int]],
        *,
        heads: tuple[int, int] = (4, 2),
        size: int = 16,
        dtype: torch.dtype = torch.float16,
    ) -> None:
        generator = torch.Generator().manual_seed(len(lengths) + sum(kv for _, kv in lengths))
        self.lengths, self.heads, self.size = lengths, heads, size
        used = [-(-kv // BLOCK) for _, kv in lengths]
        num_blocks = sum(used) + 1
        order = torch.randperm(num_blocks, generator=generator).int()
        self.table = torch.full((len(lengths), max(used)), -1, dtype=torch.int32)
        shape = (num_blocks, BLOCK, heads[1], size)
        self.key, self.value = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
        self.key[order[-1]] = torch.nan  # a page of nobody's
        self.rows, self.context = [], []
        start = 0
        for index, ((q_length, kv_length), count) in enumerate(zip(lengths, used, strict=True)):
            pages = order[start : start + count]
            self.table[index, :count] = pages
            start += count
            kv = [cache[pages.long()].flatten(0, 1)[:kv_length] for cache in (self.key, self.value)]
            self.context.append(kv)
            self.rows.append(torch.randn(q_length, heads[0], size, generator=generator).to(dtype))

    def arguments(self, layout: str = "BSH", **changes: Any) -> dict[str, Any]:
        """The call for all sequences, rows padded to the longest."""
        length = max(q for q, _ in self.lengths)
        query = torch.zeros(len(self.rows), length, *self.rows[0].shape[1:], dtype=self.key.dtype)
        for index, rows in enumerate(self.rows):
            query[index, : rows.shape[0]] = rows
        if layout == "BNSD":
            query = query.transpose(1, 2).contiguous()
        return {
            "query": query.flatten(2) if layout == "BSH" else query,
            "key": self.key.flatten(2),
            "value": self.value.flatten(2),
            "atten_mask": None if length == 1 else MASK,
            "actual_seq_qlen": [q for q, _ in self.lengths],
            "actual_seq_kvlen": [kv for _, kv in self.lengths],
            "block_table": self.table,
            "num_query_heads": self.heads[0],
            "num_key_value_heads": self.heads[1],
            "softmax_scale": self.size**-0.5,
            "input_layout": layout,
            "sparse_mode": 0 if length == 1 else 3,
            "block_size": BLOCK,
        } | changes

    def expected(self, window: int | None = None) -> list[torch.Tensor]:
        """Per sequence [q, N, D] in fp64: each row attends to what precedes it, and to itself."""
        results = []
        for rows, (key, value) in zip(self.rows, self.context, strict=True):
            group = self.heads[0] // self.heads[1]
            q_length, kv_length = rows.shape[0], key.shape[0]
            out = torch.empty(rows.shape, dtype=torch.float64)
            for row in range(q_length):
                end = kv_length - q_length + row + 1
                begin = 0 if window is None else max(0, end - window)
                for head in range(self.heads[0]):
                    k, v = (kv[begin:end, head // group].double() for kv in (key, value))
                    weights = (k @ rows[row, head].double() * self.size**-0.5).softmax(0)
                    out[row, head] = weights @ v
            results.append(out)
        return results


def attend(arguments: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """(result, logs of sums) of one call."""
    result: tuple[torch.Tensor, torch.Tensor] = torch.ops.npu.npu_fused_infer_attention_score_v2(
        **arguments
    )
    return result


def check(paged: Paged, arguments: dict[str, Any], window: int | None = None) -> None:
    """The call gives what the softmax per sequence gives, and NaN in the rows past a sequence's length."""
    out, _ = attend(arguments)
    assert out.dtype == paged.key.dtype
    assert out.shape == arguments["query"].shape
    if arguments["input_layout"] == "BNSD":
        out = out.transpose(1, 2)
    for index, wanted in enumerate(paged.expected(window)):
        rows = out[index].reshape(out.shape[1], *wanted.shape[1:])
        length = wanted.shape[0]
        torch.testing.assert_close(rows[:length].double(), wanted, rtol=2e-2, atol=2e-2)
        assert rows[length:].isnan().all()


@st.composite
def lengths_of_chunks(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Batches of chunks, at least one of more than one token, over any cached prefix."""
    pairs = draw(
        st.lists(st.tuples(st.integers(1, 9), st.integers(0, 300)), min_size=1, max_size=3)
    )
    first, rest = pairs[0], pairs[1:]
    return [(q, q + past) for q, past in ((first[0] + 1, first[1]), *rest)]


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=lengths_of_chunks(),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    layout=st.sampled_from(["BSH", "BSND", "BNSD"]),
    window=st.sampled_from([None, 1, 5, 150]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
)
def test_prefill_attends_as_a_softmax_per_sequence(
    lengths: list[tuple[int, int]],
    heads: tuple[int, int],
    layout: str,
    window: int | None,
    dtype: torch.dtype,
) -> None:
    """Chunks with cached prefixes, grouped heads, every layout, with and without a sliding window."""
    paged = Paged(lengths, heads=heads, dtype=dtype)
    band = {} if window is None else {"sparse_mode": 4, "pre_tokens": window - 1, "next_tokens": 0}
    check(paged, paged.arguments(layout, **band), window)


@pytest.mark.parametrize("layout", ["BSH", "BSND", "BNSD"])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
def test_decode_attends_as_a_softmax_per_sequence(layout: str, heads: tuple[int, int]) -> None:
    """One new token of each sequence, from its page table alone."""
    paged = Paged([(1, 1), (1, 128), (1, 129), (1, 400)], heads=heads, dtype=torch.bfloat16)
    check(paged, paged.arguments(layout))


@pytest.mark.parametrize("dims", [2, 4])
def test_a_mask_gives_decode_its_window(dims: int) -> None:
    """With one token a sequence the sparse mode has no say, and a mask over the pages hides what is too old."""
    paged, window = Paged([(1, 200), (1, 30)]), 40
    positions = torch.arange(paged.table.shape[1] * BLOCK)
    mask = torch.stack([positions < kv - window for _, kv in paged.lengths])
    mask = mask if dims == 2 else mask[:, None, None]
    check(paged, paged.arguments(atten_mask=mask), window)


def test_pages_may_hold_heads_first_for_bnsd() -> None:
    """[num_blocks, KV_N, block_size, D] is the other documented layout of pages, for BNSD alone."""
    paged = Paged([(3, 140), (2, 10)])
    turned = {name: getattr(paged, name).transpose(1, 2).contiguous() for name in ("key", "value")}
    check(paged, paged.arguments("BNSD", **turned))
    with pytest.raises(Violation, match="kv cache排布只支持"):
        attend(paged.arguments("BSH", **turned))


def test_the_logs_of_the_sums_come_where_they_are_asked_for() -> None:
    """fp32 [B, N, Q_S, 1]; otherwise a single zero."""
    paged = Paged([(2, 5)], heads=(2, 1))
    _, lse = attend(paged.arguments(return_softmax_lse=True))
    key = paged.context[0][0][:, 0].double()
    wanted = (paged.rows[0][-1].double() @ key.T * paged.size**-0.5).logsumexp(-1)
    assert lse.shape == (1, 2, 2, 1)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse[0, :, -1, 0].double(), wanted, rtol=1e-3, atol=1e-3)
    _, nothing = attend(paged.arguments())
    assert nothing.tolist() == [0.0]


def test_rows_without_context_are_nothing_to_rely_on() -> None:
    """A sequence of no keys, as padding may be, gets NaN rather than a plausible value."""
    paged = Paged([(1, 7), (1, 9)])
    out, _ = attend(paged.arguments(actual_seq_kvlen=[7, 0]))
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


def _strided(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat((tensor, tensor), -1)[..., : tensor.shape[-1]]


PREFILL = Paged([(3, 140), (2, 10)])
DECODE = Paged([(1, 140), (1, 10)])
REFUSED: list[tuple[str, Paged, dict[str, Any], type[ContractError]]] = [
    ("page attention、伪量化", PREFILL, {"input_layout": "TND"}, Undocumented),
    ("not modelled", PREFILL, {"input_layout": "BSH_NBSD"}, Unsupported),
    ("not modelled", PREFILL, {"block_table": None}, Unsupported),
    ("learnable_sink not modelled", PREFILL, {"learnable_sink": torch.ones(4)}, Unsupported),
    ("必须传入actual_seq_kvlen", PREFILL, {"actual_seq_kvlen": None}, Violation),
    ("其他长度不支持", Paged([(1, 5)] * 3), {"actual_seq_kvlen": [5, 5]}, Violation),
    ("Q_S为1时该参数无效", PREFILL, {"actual_seq_qlen": [4, 2]}, Violation),
    ("要求是128的倍数", PREFILL, {"block_size": 64}, Violation),
    ("需要16对齐", DECODE, {"block_size": 24}, Violation),
    ("最大不超过512", DECODE, {"block_size": 0}, Violation),
    ("一共4种模式", PREFILL, {"inner_precise": 4}, Violation),
    ("kv cache排布只支持", DECODE, {"block_size": 64}, Violation),
    ("数据类型支持int32", PREFILL, {"block_table": PREFILL.table.long()}, Violation),
    ("block_table必须为二维", PREFILL, {"block_table": PREFILL.table[:1]}, Violation),
    ("block_table必须为二维", PREFILL, {"block_table": PREFILL.table[:, :1].contiguous()}, Violation),
    ("is not contiguous", PREFILL, {"block_table": PREFILL.table.T.contiguous().T}, Undocumented),
    ("需用户自行保证", PREFILL, {"block_table": PREFILL.table - 9}, Violation),
    ("block数量之和", DECODE, {"key": DECODE.key.flatten(2)[:2], "value": DECODE.value.flatten(2)[:2]}, Violation),
    ("固定为2048", PREFILL, {"atten_mask": None}, Violation),
    ("固定为2048", PREFILL, {"atten_mask": MASK[:512, :512].contiguous()}, Violation),
    ("wrong triangle", PREFILL, {"atten_mask": ~MASK}, Violation),
    ("数据类型支持bool、int8和uint8", PREFILL, {"atten_mask": MASK.half()}, Violation),
    ("取其它值时会报错", PREFILL, {"sparse_mode": 5}, Violation),
    ("sparse_mode 1 not modelled", PREFILL, {"sparse_mode": 1}, Unsupported),
    ("参数起点为右下角", PREFILL, {"sparse_mode": 4, "pre_tokens": -1}, Undocumented),
    ("该参数无效", DECODE, {"sparse_mode": 3, "atten_mask": MASK}, Undocumented),
    ("innerPrecise为0和1", DECODE, {"inner_precise": 2}, Violation),
    ("maxBlockNumPerSeq", DECODE, {"atten_mask": torch.zeros(2, 140, dtype=torch.bool)}, Violation),
    ("精度可能会有损失", DECODE, {"atten_mask": torch.ones(2, 256, dtype=torch.bool)}, Undocumented),
    ("比值不能大于64", PREFILL, {"num_key_value_heads": 3}, Violation),
    ("Q_S,H", PREFILL, {"num_query_heads": 3}, Violation),
    ("不支持非连续", PREFILL, {"query": _strided(PREFILL.arguments()["query"])}, Violation),
    ("不支持非连续", PREFILL, {"key": _strided(PREFILL.key.flatten(2))}, Violation),
    ("支持float16、bfloat16", PREFILL, {"query": PREFILL.arguments()["query"].float()}, Violation),
    ("pages torch.float16", PREFILL, {"query": PREFILL.arguments()["query"].bfloat16()}, Undocumented),
    ("shape需保证一致", PREFILL, {"value": torch.cat([PREFILL.value.flatten(2)] * 2)}, Violation),
    ("D轴需16对齐", Paged([(2, 5)], size=24), {}, Violation),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "paged", "changes", "error"), REFUSED)
def test_a_call_the_documentation_does_not_allow_is_refused(
    reason: str, paged: Paged, changes: dict[str, Any], error: type[ContractError]
) -> None:
    """Whatever is forbidden, left open or not modelled raises and says why."""
    with pytest.raises(error, match=reason):
        attend(paged.arguments(**changes))


@pytest.mark.parametrize(
    ("layout", "reason"), [("BSH", "要求N\\*D小于65535"), ("BNSD", "KV_N\\*D超过65535")]
)
def test_rows_of_a_page_have_a_widest(layout: str, reason: str) -> None:
    """All heads of one position together are limited, in the query's layout or in the pages'."""
    heads, size = 256, 272
    shape = (1, 1, heads * size) if layout == "BSH" else (1, heads, 1, size)
    pages = torch.zeros(1, BLOCK, heads * size, dtype=torch.float16)
    with pytest.raises(Violation, match=reason):
        torch.ops.npu.npu_fused_infer_attention_score_v2(
            torch.zeros(shape, dtype=torch.float16),
            pages,
            pages,
            actual_seq_kvlen=[2],
            block_table=torch.zeros(1, 1, dtype=torch.int32),
            num_query_heads=heads,
            input_layout=layout,
            block_size=BLOCK,
        )
