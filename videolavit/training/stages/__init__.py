"""The stages: what is trained, on what, and to which objective. `videolavit.training.stage.STAGES` lists them."""
