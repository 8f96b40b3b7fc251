"""Evaluation: what a bundle makes, measured by plain geometry on the decoded video, with no learned judge.

Contract: everything is made by the runtime from scenes of the world of shapes that training never showed, written as a
video file and read back before it is looked at. Only the runtime and its dependencies are needed, no torch.

    regions, outlines, judge   frames -> the shapes that are to be seen in them
    verdicts                   what is seen, and what was asked for -> checks
    record, context            what parts measure with, and what they leave
    prompts, questions, ...    parts: one kind of task each; `parts` lists them
    work                       runs parts in processes
    statistics, figures        records -> figures with intervals
    report, sheet              figures -> docs/quality.md, and frames to look at
"""
