"""The terms that a report uses, explained where they are used."""

from __future__ import annotations

TERMS = {
    "models": "w2a2: 2 bits for each weight, 2 for each activation (the values between layers). FP32 twin: the "
    "student's net with 32-bit floats. In brackets: the 95 % interval, within which the accuracy on many more images "
    "of this kind would be. Parity: the share of test images that get the same class from the ONNX file as from the "
    "trained student, with ONNX Runtime's optimizations off (and on). Latency: time of one inference, half of them "
    "take longer.",
    "size": "Theoretical: weights at their bits, four bytes for each bias and weight scale (a float net: for each "
    "parameter). The file holds the graph, too.",
    "cost": "Multiply-accumulates: products that are added up. BOPs: the same, times the bits of both factors. "
    "Activation peak: the most memory that values between layers need at a time.",
    "devices": "p10, p90, p99: one in ten inferences is faster than p10, one in ten slower than p90, one in a hundred "
    "slower than p99. Vs. FP32: median latency over that of the FP32 file. Accuracy: on the sample of test images that "
    "was sent along. Agreement: the share of these images that get the class there that the trained net gives them.",
    "classes": "Accuracy of one class: the share of its test images that get it.",
    "confusion": "A row holds the test images of one class, a column what the student says. Right answers are on the "
    "diagonal; the darker, the larger the share of the row.",
    "mistakes": "Test images that the student is most confident of, and wrong about: its answer with its probability, "
    "then what the image shows.",
    "agents": "An agent changes training images at random, so that a net sees more than there are: here the same "
    "images, unchanged and as each agent shows them in some epochs (passes over the training images).",
    "layers": "Codes: the whole numbers that weights are stored as. Parity: the largest difference between student "
    "and file on the layer's output, in steps of its grid.",
    "fall_backs": "ONNX Runtime has no integer kernel for these: they are right, but slow.",
}
