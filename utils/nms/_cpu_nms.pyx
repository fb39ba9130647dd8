# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Greedy suppression on the CPU: the result of `utils.nms._torch_mask`, float for float."""


cdef inline float larger(float a, float b) noexcept nogil:
    return a if a > b else b


cdef inline float smaller(float a, float b) noexcept nogil:
    return a if a < b else b


cdef inline float extent(float low, float high) noexcept nogil:
    return high - low + <float>1  # the cast, as C would go on in double


def mask(const float[:, ::1] columns not None, const long long[::1] labels not None,
         float thresh, Py_ssize_t per_class, unsigned char[::1] keep not None):
    """Clears `keep` where a box is suppressed.

    columns: [4, N] x1, y1, x2, y2 in pixels, N > 0, sorted by label and within a label best first.
    labels: [N]; thresh: suppress above this IoU; per_class: the most boxes kept of one label.
    keep: [N], all 1 on entry.
    """
    cdef Py_ssize_t n = labels.shape[0], i, j, end = 0, kept = 0
    if columns.shape[0] != 4 or columns.shape[1] != n or keep.shape[0] != n or n == 0:
        raise ValueError(f"columns [{columns.shape[0]}, {columns.shape[1]}], {n} labels and keep "
                         f"[{keep.shape[0]}] do not belong together")
    cdef const float *x1 = &columns[0, 0]
    cdef const float *y1 = &columns[1, 0]
    cdef const float *x2 = &columns[2, 0]
    cdef const float *y2 = &columns[3, 0]
    cdef unsigned char *alive = &keep[0]
    cdef float left, top, right, bottom, area, inter, union
    with nogil:
        for i in range(n):
            if i == end:
                kept = 0
                while end < n and labels[end] == labels[i]:
                    end += 1
            if kept == per_class:
                alive[i] = 0
            if not alive[i]:
                continue
            kept += 1
            left, top, right, bottom = x1[i], y1[i], x2[i], y2[i]
            area = extent(left, right) * extent(top, bottom)
            # No branch on alive[j], so that the compiler can make vector instructions of this loop.
            for j in range(i + 1, end):
                inter = (larger(extent(larger(left, x1[j]), smaller(right, x2[j])), 0)
                         * larger(extent(larger(top, y1[j]), smaller(bottom, y2[j])), 0))
                union = area + extent(x1[j], x2[j]) * extent(y1[j], y2[j]) - inter
                alive[j] &= not (inter / union > thresh)
