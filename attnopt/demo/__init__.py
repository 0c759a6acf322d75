"""The main job: real models, optimised side by side with eager and measured against fp64."""
