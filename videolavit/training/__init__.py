"""Training: one loop, one stage per part of the model, and the recipes of the shipped model.

Contract: `stage` says what a stage is and lists them, `settings` what a recipe may say, `loop` trains any stage, and
`commands` is `videolavit train`. Only the stages know objectives; only the loop knows devices, files and resuming.
"""
