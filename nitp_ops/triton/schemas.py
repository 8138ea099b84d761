"""The row-kernel schemas of csrc/library.cpp, for an installation without its library. A test compares them."""

SCHEMAS = {
    "swiglu_rows": "(Tensor gate, Tensor up, Tensor(a!) out) -> ()",
    "swiglu_rows_backward_": (
        "(Tensor(a!) gate, Tensor(b!) up, Tensor upstream, Tensor(c!)? d_gate=None, Tensor(d!)? d_up=None) -> ()"
    ),
    "alignment_rows_": (
        "(Tensor(a!) prediction, Tensor target, Tensor? target_rows, Tensor? row_scale, Tensor(b!) stats, "
        "Tensor(c!)? d_prediction, Tensor(d!)? d_target, int distance, float eps, bool gradient) -> ()"
    ),
    "cross_entropy_rows_": (
        "(Tensor(a!) logits, Tensor labels, Tensor? target_weight, Tensor? bias, Tensor? class_weight, "
        "Tensor? row_scale, Tensor(b!) stats, Tensor(c!) target_logit, Tensor(d!) prediction, int ignore_index, "
        "bool negative_is_absent, float label_smoothing, float z_loss, float softcap, float logit_scale, "
        "bool gradient, Tensor(e!)? parts=None) -> ()"
    ),
    "cross_entropy_gradient_rows_": (
        "(Tensor(a!) logits, Tensor labels, Tensor target_scale, Tensor target_logit, Tensor? bias, "
        "Tensor? class_weight, Tensor factors, float softcap, float logit_scale) -> ()"
    ),
    "accumulate_rows_": "(Tensor(a!) sum, Tensor addend, Tensor? factor=None) -> ()",
    "scale_rows_": "(Tensor(a!) rows, Tensor factor, Tensor(b!)? out=None) -> ()",
}
