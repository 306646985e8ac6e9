"""The synthetic world of the embedded models: its scenes, questions and clips, and how the models are trained."""
