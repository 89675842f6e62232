"""Explanations of the terms in a report, shown where they are used."""

from __future__ import annotations

TERMS = {
    "models": "w2a2: 2 bits for each weight, 2 for each activation (the values between layers). FP32 twin: the "
    "student's net with 32-bit floats. In parentheses: the 95 % interval, which should contain the accuracy on "
    "many more images of this kind. Parity: the share of test images that get the same class from the ONNX file as "
    "from the trained student, with ONNX Runtime's optimizations off (and on). Latency: median time of one inference, "
    "of one image on this machine unless the heading says otherwise.",
    "size": "Theoretical: weights at their bit width, four bytes for each bias and weight scale (in a float net, for "
    "each parameter). The file also holds the graph.",
    "cost": "Multiply-accumulates: products that are added up. BOPs: the same, times the bits of both factors. "
    "Activation peak: the most memory that values between layers need at one time.",
    "devices": "p10, p90, p99: one in ten inferences is faster than p10, one in ten slower than p90, one in a hundred "
    "slower than p99. Size: of the file. Memory: the peak of a separate process that loads the file and runs it once, "
    "Python and runtime included. Vs. FP32: median latency divided by that of the FP32 file. Accuracy: on the sample "
    "that was sent along; a run's own holds test images. Agreement: the share of these images that get the same class "
    "as from the trained net (int8-static: from the float net; a file whose logits are unknown: from itself, not "
    "optimized).",
    "classes": "Accuracy of one class: the share of its test images that are classified correctly.",
    "confusion": "Each row holds the test images of one class, each column a class that the student predicts. Right "
    "answers are on the diagonal; the darker a cell, the larger its share of the row.",
    "mistakes": "The test images on which the student is most confidently wrong: its answer with its probability, then "
    "what the image shows.",
    "agents": "An agent augments training images at random, so that a net sees more variety. Here are the same "
    "images, unchanged and as each agent shows them in some epochs (passes over the training images).",
    "layers": "Codes: the whole numbers that weights are stored as. Parity: the largest difference between student "
    "and file on the layer's output, in steps of its grid.",
    "fall_backs": "ONNX Runtime has no integer kernel for these: they are correct, but slow.",
}
