"""The inputs and outputs of a TensorRT plan: what compile builds and the runtime binds.

One step advances B rows by T tokens each. Row b's tokens take the positions `write_indices[b]` and
on; its linear cache is written there and attended to up to and with each token's own position.
Rows shorter than T are padded at their end: what padding writes lies behind the row's real tokens,
no token of the step that counts attends to it, and the next step overwrites it. That is why a cache
has room for one chunk more than the longest sequence (`TensorRt.cache_tokens`), and why
`kv_lengths[b]` is `write_indices[b] + T` whatever the row's real length.

Shapes: B rows, T tokens a row, S cache places (static), D hidden, V vocabulary, K the rank's KV
heads, H values a head. Under context parallelism B x T is a multiple of cp.

    input_ids      [B, T]        int32   the first stage's input
    hidden_in      [B, T, D]     bf16    a later stage's input instead
    write_indices  [B]           int32   each row's first position in this step
    position_ids   [B, T]        int32   write_indices[b] + t
    kv_lengths     [B]           int32   write_indices + T
    sample_index   [B]           int32   b x T + the row's last real token; last stage only
    past_k_{i}     [B, K, S, H]  bf16    and past_v_{i}, for each layer i of the stage, counted
                                         over all stages
    present_k_{i}                        and present_v_{i}: the same memory; TensorRT writes in
                                         place and demands the same address
    logits         [B, V]        float32 the last stage's output, the same on every rank of it
    hidden_out     [B, T, D]     bf16    an earlier stage's output, the same on every rank of it
"""

INPUT_IDS = "input_ids"
HIDDEN_IN = "hidden_in"
WRITE_INDICES = "write_indices"
POSITION_IDS = "position_ids"
KV_LENGTHS = "kv_lengths"
SAMPLE_INDEX = "sample_index"
LOGITS = "logits"
HIDDEN_OUT = "hidden_out"


def past(kind: str, layer: int) -> str:
    """Name of a cache as an input; `kind` is "k" or "v"."""
    return f"past_{kind}_{layer}"


def present(kind: str, layer: int) -> str:
    """Name of the same cache as an output."""
    return f"present_{kind}_{layer}"


def plan_file(rank: int) -> str:
    return f"rank-{rank}.plan"


def inspection_file(rank: int) -> str:
    """The network's layers, one JSON object."""
    return f"rank-{rank}.network.json"
