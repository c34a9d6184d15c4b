"""Studies: many compressed models of one backbone, measured on Ray, each step of work done once.

Read space (what a user asks), stage_graph and trial_stages (what a trial is made of; how it is done is in
model_stages and measurement_stages), trial, then proposals, searcher and study (which trial is next, and
running them); folder, activity, display and time_estimate serve these.
"""
