"""BatchNormalization for onnx.reference's evaluator, in every opset and mode, computed by cbn."""

from onnx.reference.op_run import OpRun

import cbn

from .graph import attributes, is_inference, opset_of


class BatchNormalization(OpRun):
    op_domain = ""

    def _run(self, x, scale, bias, mean, var, epsilon=None, momentum=None, **_):
        """y, and in training mode what the opset puts out besides: (running mean, running var), before opset 14 also the batch's own."""
        version, shape = opset_of(self.run_params["opsets"]), x.shape
        parameters = scale, bias, mean, var
        if version < 9 and not attributes(self.onnx_node).get("spatial", 1):     # statistics of each element, over the batch
            x, parameters = x.reshape(shape[0], -1), [a.reshape(-1) for a in parameters]
        scale, bias, *running = parameters
        if is_inference(self.onnx_node, version):
            return (cbn.batch_norm(x, *running, scale, bias, eps=epsilon).reshape(shape),)
        _, *batch = cbn.batch_stats(x)
        y = cbn.batch_norm(x, *batch, scale, bias, eps=epsilon).reshape(shape)
        updated = [old * momentum + new * (1 - momentum) if x.size else old for old, new in zip(running, batch, strict=True)]
        results = [a.reshape(mean.shape) for a in (*updated, *batch)]
        types = [mean.dtype, var.dtype, x.dtype, x.dtype]
        return y, *(a.astype(dtype) for a, dtype in zip(results[:2 if version >= 14 else 4], types, strict=False))


def operators():
    """Operators for onnx.reference.ReferenceEvaluator(model, new_ops=cbn.onnx.operators()): BatchNormalization of every opset.

    That is of opsets 1, 6, 7, 9, 14 and 15, at inference and in training mode, in float16, bfloat16, float32 and float64. The evaluator's own
    is wrong in some of these: docs/onnx.md has the list.
    """
    return [BatchNormalization]


def runtime_library():
    """The path of a library for ONNX Runtime 1.17 or later: options.register_custom_ops_library(cbn.onnx.runtime_library()).

    It has an operator of the domain "cbn", version 1: BatchNormalization(X, scale, B, mean, var) at inference, all float32 or all float64, of
    the bits of cbn.batch_norm. Its attributes are epsilon (1e-5), activation ("none"; a word of cbn's `activation=`), alpha and beta (the
    bounds of "clip"; alpha is the slope of "leaky_relu"). It is only for this process, as it calls into cbn's modules.
    """
    from . import runtime

    return runtime.__file__
