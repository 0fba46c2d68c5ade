"""Say in which stage of isolate each planted bug is first seen."""

from __future__ import annotations

from flashcore.kernels.bwd_mask_sm90.plan import DMASK_KERNEL
from flashcore.kernels.bwd_sm90.plan import DKDV_KERNEL, DQ_KERNEL
from flashcore.kernels.fwd_sm90.plan import KERNEL as _SM90
from flashcore.kernels.fwd_wmma.plan import KERNEL as _WMMA
from flashcore.sim.plants.bwd_mask_sm90 import PLANTS_BWD_MASK_SM90
from flashcore.sim.plants.fwd_sm90.packed import PLANTS_PACKED

# By kernel, the bugs whose first wrong stage it is.
STAGES: dict[str, dict[str, tuple[str, ...]]] = {
    _WMMA: {
        "qk": (
            *("no-barrier", "uninit-smem", "deadlock", "one-stage-unordered"),
            *("widened-early", "widened-not-awaited"),
        ),
        "softmax": (
            *("accum-map", "large-max-product", "large-max-twice"),
            *("tree-at-the-front", "tree-as-wide-as-rows", "tree-row-of-a-row", "tree-read-before"),
        ),
        "pv": ("pv-atomic", "k-overlap", "k-gap"),
        "full": (
            *("values-of-the-first", "totals-not-rescaled", "totals-counted-twice", "totals-lost"),
            *("sink-of-the-first", "max-score-of-one-head"),
            *("page-of-the-first", "page-of-the-tile", "tree-first-key-lost"),
            *("stream-border-tile-twice", "stream-border-tile-lost", "stream-whole-not-divided"),
            *("piece-of-all-keys", "widened-without-sign", "widened-in-exchange"),
        ),
        "schedule": ("stream-counter-left", "piece-not-handed-on", "piece-moved-on-early"),
        "tile": ("sink-beside-raw-scores",),
        "load": (
            *("one-ahead", "neighbours-key", "no-clamp", "stream-head-kept", "widened-next-stage"),
            *("page-unchecked", "page-of-no-key", "page-row-unbounded", "page-length-unclamped"),
        ),
        "store": (
            *("tail-oob", "neighbours-query", "tile-search", "tile-numbers"),
            *("max-score-stored", "max-score-of-padding", "sink-past-the-heads"),
            *("stream-range-short", "stream-one-slot", "stream-slot-of-the-next-row-tile"),
            *("stream-counter-of-the-last-block", "stream-end-on-a-border"),
            *("stream-heads-not-counted", "stream-empty-left-out", "stream-whole-past-the-end"),
        ),
    },
    _SM90: {
        "setup": (
            "no-init-fence",
            "no-init-barrier",
            "registers-of-three-warps",
            "packed-clear-no-fence",
        ),
        "schedule": (
            *("coord-slots", "coord-late", "draws-left", "first-tiles-drawn-again"),
            *("counter-left", "scan", "feed-not-waited-for", "feed-asked-early"),
            *("split-counter-left", "stream-counter-left", "q-buffers-in-step"),
            *("together-departures-left", "split-later-piece-known"),
            "page-two-leaders",
        ),
        "load": (
            *("no-empty-wait", "parity-never-flips", "tx-too-few", "early-loads"),
            "ring-of-all-stages",
            *("page-box-without-rows", "page-box-behind-the-table", "page-lanes-ahead"),
            *("float8-no-full-wait", "float8-lanes-ahead", "float8-queries-given-back"),
            *("few-keys-not-awaited", "few-values-not-awaited", "few-keys-given-back"),
            *("page-place-ahead", "page-length-unclamped", "page-box-believed"),
            *("packed-query-as-row", "packed-full-box-one-more"),
        ),
        "qk": (
            *("no-full-wait", "early-release", "early-q-release", "stage-mixed-up", "k-advance"),
            *("tx-too-many", "no-wgmma-fence", "early-consumers", "q-of-another-group"),
            *("float8-no-empty-wait", "float8-no-fence", "float8-queries-ahead"),
            *("packed-rows-not-cleared", "first-q-not-awaited"),
        ),
        "softmax": (
            *("accum-map", "mask-not-awaited", "mask-of-other-lanes", "mask-overwritten"),
            *("mask-past-end", "mask-row-mixed-up", "mask-one-tile-late", "mask-front-whole"),
            *("mask-rows-one-tile-late", "mask-rows-past-end", "mask-row-again"),
            *("mask-front-not-copied", "mask-end-not-copied", "mask-unshifted-copies"),
            *("mask-shift-forgotten", "mask-shift-of-another-row"),
            *("tree-at-the-front", "tree-as-wide-as-rows", "tree-row-of-a-row"),
            *("tree-copied-before", "tree-copied-behind", "tree-under-ones"),
            *("large-max-product", "large-max-twice"),
        ),
        "pv": (
            *("asked-for-last", "no-is-yes", "output-kept", "wrong-parity", "no-commit"),
            *("accum-not-waited-for", "v-leading-bytes", "swizzle"),
        ),
        "full": (
            *("accum-written-early", "probs-written-early", "shares-on-one-ring", "turn-count"),
            *("turn-not-handed-on", "share-never-taken", "share-without-weight"),
            *("share-sum-lost", "passed-over-unawaited", "passed-over-kept", "passed-over-turn"),
            *("passed-over-too-many", "outgrown-unseen", "no-max-yet-unseen"),
            *("unseen-part-of-the-warp-before", "unseen-part-kept", "second-part-not-hidden"),
            *("outgrown-in-one-warp", "outgrown-k-kept", "outgrown-k-overwritten"),
            *("outgrown-sums-kept", "outgrown-no-fence", "outgrown-not-awaited"),
            *("outgrown-unmasked", "outgrown-mask-overwritten"),
            *("split-share-dropped", "split-without-weight", "split-sums-not-rescaled"),
            *("split-last-share-again", "split-gap", "values-off-by-one"),
            *("together-last-share-again", "together-without-weight", "together-lanes-not-added"),
            *("passed-over-unsynced", "passed-over-turn-too-many", "outgrown-one-group-early"),
            *("sum-of-the-neighbour", "turns-of-two", "unseen-q-kept"),
            *("third-share-unseen", "second-part-alone", "first-part-kept"),
            *("unmasked-too-far-right", "unmasked-too-far-left", "last-key-alone"),
            *("folded-as-rows", "large-max-left", "large-max-of-first-part"),
            *("max-score-of-one-head", "max-score-of-first-slice"),
            *("sink-of-the-first", "sink-of-every-split"),
            *("page-unchecked", "page-of-the-first", "page-box-whole", "page-box-not-zeroed"),
            *("page-not-advanced", "page-of-the-next-keys", "page-patterns-side-by-side"),
            *("page-groups-side-by-side", "page-rows-as-groups"),
            *("tree-first-key-lost", "tree-hides-before", "tree-taken-again", "tree-not-copied"),
            *("stream-border-tile-twice", "stream-border-tile-lost", "stream-whole-not-divided"),
            *("float8-end-unsaid", "float8-one-warp-counted", "float8-unswizzled"),
            *("float8-scale-of-the-first", "float8-factor-kept"),
            *("few-keys-of-the-first", "few-columns-as-wgmma", "few-bytes-in-place"),
            *("few-unswizzled", "few-sums-not-awaited", "few-sums-overwritten"),
            *("few-sums-unweighted", "few-sums-of-every-lane", "few-rows-of-the-first"),
            *("few-rows-eight", "few-max-outgrown"),
            *("packed-bounds-of-the-first", "packed-box-of-64-rows"),
        ),
        "tile": ("sink-beside-raw-scores",),
        "store": (
            *("no-proxy-fence", "no-store-barrier", "o-overwritten", "o-part-overwritten"),
            *("o-part-misplaced", "no-store-commit", "exit-with-store", "share-not-awaited"),
            *("share-overwritten", "split-relaxed", "split-no-barrier"),
            *("split-arrival-not-awaited", "split-last-too-early", "split-never-last"),
            *("split-one-counter", "split-rows-past-the-end", "stream-range-short"),
            *("together-relaxed", "together-plain-look", "together-told-late"),
            *("together-leaves-silently", "together-first-slice-of-who-left"),
            *("together-all-are-there", "together-slices-too-short", "together-one-counter"),
            *("together-slice-past-the-end", "together-reset-early"),
            "together-padding-stored",
            *("stream-one-slot", "stream-slot-of-the-next-row-tile", "stream-end-on-a-border"),
            *("stream-counter-of-the-last-block", "stream-heads-not-counted", "stream-head-kept"),
            *("stream-empty-left-out", "stream-whole-past-the-end"),
            *("box-of-a-neighbour", "class-left-out", "sink-past-the-heads"),
            *("packed-head-of-the-first", "packed-row-of-nobody", "packed-last-query-alone"),
            *("packed-heads-one-by-one", "packed-tiles-of-queries"),
            *PLANTS_PACKED,
            *("max-score-stored", "max-score-of-padding"),
        ),
    },
    DMASK_KERNEL: {"dmask": tuple(PLANTS_BWD_MASK_SM90)},
    DQ_KERNEL: {
        "delta": (
            *("delta-of-one-lane", "dlse-forgotten", "dout-read-late", "delta-of-a-neighbour"),
        ),
        "store": ("queries-behind-stored",),
        "dq": ("k-released-early",),
        "full": ("empty-rows-kept",),
        "ds": ("mask-of-other-rows", "mask-of-this-tile-again", "mask-overwritten-by-the-next"),
    },
    DKDV_KERNEL: {
        "load": (
            *("do-released-early", "q-released-early", "heads-of-queries", "box-without-a-key"),
        ),
        "ds": (
            *("stale-stats", "stats-released-by-one-lane", "kv-released-early"),
            *("clear-without-fence", "probs-not-awaited", "v-overwritten", "dp-not-awaited"),
            *("query-tile-skipped", "last-of-group-skipped", "neighbour-lse", "diagonal-hidden"),
            *("probs-overwritten", "stats-of-the-first", "longest-instead-of-own"),
            *("strip-not-awaited", "strip-of-own-copies", "strip-overwritten", "swapped-operand"),
            *("strip-of-this-tile-again", "strip-of-the-first-keys", "q-of-dk-released-early"),
            *("rank-from-the-first-key", "v-not-awaited"),
        ),
        "dv": ("empty-rows-spread",),
        "full": ("keys-behind-kept",),
        "dq": (
            *("ds-not-awaited", "ds-overwritten", "ds-without-fence", "sums-overwritten"),
            *("sums-without-fence", "ds-released-early", "k-released-before-dq"),
            *("neighbour-rows", "head-of-group", "ds-of-neighbour-not-awaited"),
            *("part-of-dq-not-awaited", "ds-over-dk", "shared-ds-released-early", "last-dq-kept"),
            *("dq-before-the-first", "columns-of-the-other", "dk-over-ds"),
            *("sums-released-early", "adders-at-one-place"),
            *("turn-not-awaited", "turn-told-early", "turn-told-when-read", "turn-told-relaxed"),
            *("turn-without-fence", "first-adds-too"),
        ),
        "dk": ("dk-added-twice", "scale-forgotten"),
        "store": (
            *("dk-over-dv", "place-released-early", "neighbour-keys-stored"),
            *("box-of-a-key-late", "last-keys-forgotten", "v-over-dv"),
        ),
    },
}
