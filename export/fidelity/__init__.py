"""Fidelity: how near our numbers are to the reference's, from torch, from ONNX Runtime and from numpy.

Contract: a folder of golden files (inputs, weights and outputs of the reference code, one case a file) is measured
file by file and backend by backend. Which family of cases a file belongs to is read from what it says about itself,
and every size from its configuration and its tensors, so that a folder with other sizes is measured alike.

    measure      golden file, backend -> measurements, one for every quantity compared
    registry     which family measures what on which backend, and the files of a folder that nothing measures
    report       measurements -> docs/fidelity.md
"""
