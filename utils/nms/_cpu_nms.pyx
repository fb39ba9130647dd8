# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Hard and soft suppression on the CPU: one task per group of boxes, without the GIL.

The result equals that of `utils.nms.reference` float for float: every IoU is computed in float32 by
the same operations in the same order.
"""

from cython.parallel cimport prange
from libc.math cimport exp
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memcpy
from libcpp.algorithm cimport make_heap, pop_heap

INTERFACE = 2  # the version of the arguments, as utils/nms/backends.py expects it

cdef enum:
    HARD, LINEAR, GAUSSIAN
    BLOCK = 64  # rivals compared before the result is checked, enough for vector instructions


cdef struct Rule:
    float thresh
    int64_t limit
    int method
    double sigma
    float min_score
    float extra


cdef inline float larger(float a, float b) noexcept nogil:
    return a if a > b else b


cdef inline float smaller(float a, float b) noexcept nogil:
    return a if a < b else b


cdef inline float overlap(float ax1, float ay1, float ax2, float ay2, float area,
                          float bx1, float by1, float bx2, float by2, float extra) noexcept nogil:
    """Return the IoU of box a, of known area, and box b; NaN if the union is empty."""
    cdef float inter = (larger(smaller(ax2, bx2) - larger(ax1, bx1) + extra, 0)
                        * larger(smaller(ay2, by2) - larger(ay1, by1) + extra, 0))
    return inter / (area + (bx2 - bx1 + extra) * (by2 - by1 + extra) - inter)


cdef inline uint64_t priority(float score, int64_t position) noexcept nogil:
    """Return a number, larger for the higher score and, of equal scores, for the earlier box."""
    cdef uint32_t bits
    score = score + <float>0  # -0 becomes 0
    memcpy(&bits, &score, 4)
    bits = ~bits if bits >> 31 else bits | 0x80000000u
    return <uint64_t>bits << 32 | <uint32_t>~position


cdef void hard(const float *boxes, const float *scores, const int64_t *order, int64_t count,
               Rule rule, int64_t *kept, float *kept_scores, uint64_t *heap,
               float *rivals) noexcept nogil:
    # A heap, because the best few boxes usually settle a group; the others are never sorted.
    cdef int64_t i, k, end, start, left = count, room = min(rule.limit, count), taken = 0
    cdef float x1, y1, x2, y2, area
    # The kept boxes, one array per column.
    cdef float *x1s = rivals
    cdef float *y1s = rivals + room
    cdef float *x2s = rivals + 2 * room
    cdef float *y2s = rivals + 3 * room
    cdef float *areas = rivals + 4 * room
    cdef int beaten
    cdef const float *box
    for i in range(count):
        heap[i] = priority(scores[order[i]], i)
    make_heap(heap, heap + count)
    while taken < room and left:
        i = <uint32_t>~heap[0]
        pop_heap(heap, heap + left)
        left -= 1
        box = boxes + 4 * order[i]
        x1, y1, x2, y2 = box[0], box[1], box[2], box[3]
        area = (x2 - x1 + rule.extra) * (y2 - y1 + rule.extra)
        beaten = 0
        start = 0
        while start < taken and not beaten:
            end = min(start + BLOCK, taken)
            for k in range(start, end):
                beaten |= overlap(x1s[k], y1s[k], x2s[k], y2s[k], areas[k],
                                  x1, y1, x2, y2, rule.extra) > rule.thresh
            start = end
        if not beaten:
            x1s[taken], y1s[taken], x2s[taken], y2s[taken], areas[taken] = x1, y1, x2, y2, area
            kept[taken] = order[i]
            kept_scores[taken] = scores[order[i]]
            taken += 1


cdef void soft(const float *boxes, const float *scores, const int64_t *order, int64_t count,
               Rule rule, int64_t *kept, float *kept_scores, int64_t *left,
               float *values) noexcept nogil:
    # left: the boxes not yet selected, in order, so that the first of equal scores wins.
    # values: their current scores.
    cdef int64_t i, best = 0, still = 0, taken = 0
    cdef const float *winner
    cdef const float *box
    cdef float area, value, iou
    for i in range(count):
        if scores[order[i]] >= rule.min_score:
            left[still], values[still] = order[i], scores[order[i]]
            if values[still] > values[best]:
                best = still
            still += 1
    while still and taken < rule.limit:
        winner = boxes + 4 * left[best]
        area = (winner[2] - winner[0] + rule.extra) * (winner[3] - winner[1] + rule.extra)
        kept[taken], kept_scores[taken] = left[best], values[best]
        taken += 1
        left[best] = -1
        count, still, best = still, 0, 0
        for i in range(count):
            if left[i] < 0:
                continue
            box, value = boxes + 4 * left[i], values[i]
            iou = overlap(winner[0], winner[1], winner[2], winner[3], area,
                          box[0], box[1], box[2], box[3], rule.extra)
            if rule.method == LINEAR:
                if iou > rule.thresh:
                    value = value * (<float>1 - iou)  # a plain 1 is a double in Cython
            elif iou > 0:
                # In double, then rounded: exp differs in the last bits only.
                value = value * <float>exp(-(<double>iou * iou) / rule.sigma)
            if value >= rule.min_score:
                left[still], values[still] = left[i], value
                if value > values[best]:
                    best = still
                still += 1


def select(const float[:, ::1] boxes not None, const float[::1] scores not None,
           const int64_t[::1] order not None, const int64_t[::1] starts not None, int64_t groups,
           float thresh, int64_t limit, int method, double sigma, float min_score, float extra,
           int64_t[::1] kept not None, float[::1] kept_scores not None,
           uint64_t[::1] keys not None, float[::1] columns not None, int threads):
    """Suppress within each group, as `_cuda_nms.cu` does; see `utils.nms.reference`.

    boxes: [N, 4] x1, y1, x2, y2. scores: [N], no NaN. order: [N] boxes sorted by group, within a
    group in their own order. starts: [groups + 1 or more]; group g is
    order[starts[g]:starts[g + 1]]. thresh .. extra: the fields of a `Rule`. threads: the most to
    use, if the compiler had OpenMP.
    kept: [N], -1 on entry. From starts[g] on it receives the selected boxes of group g in the order
    of selection; kept_scores [N] receives their scores at that time.
    keys: [N], columns: [5 N], working memory.
    """
    cdef Py_ssize_t n = scores.shape[0]
    cdef int64_t g, first, count
    cdef Rule rule = Rule(thresh, limit, method, sigma, min_score, extra)
    if (boxes.shape[0] != n or boxes.shape[1] != 4 or order.shape[0] != n or groups < 0
            or starts.shape[0] <= groups or kept.shape[0] != n or kept_scores.shape[0] != n
            or keys.shape[0] != n or columns.shape[0] != 5 * n):
        raise ValueError(f"boxes [{boxes.shape[0]}, {boxes.shape[1]}], {n} scores, order "
                         f"[{order.shape[0]}], {groups} groups, starts [{starts.shape[0]}] and "
                         f"kept [{kept.shape[0]}] do not belong together")
    if n == 0:
        return
    for g in prange(groups, nogil=True, schedule="dynamic", num_threads=threads):
        first = starts[g]
        count = starts[g + 1] - first
        if method == HARD:
            hard(&boxes[0, 0], &scores[0], &order[first], count, rule,
                 &kept[first], &kept_scores[first], &keys[first], &columns[5 * first])
        else:
            soft(&boxes[0, 0], &scores[0], &order[first], count, rule, &kept[first],
                 &kept_scores[first], <int64_t *>&keys[first], &columns[5 * first])
