"""Texts that models are tried on: the same ones everywhere, so that all workers of a corpus choose alike."""

PROBE = (
    "What lowers the risk of a second stroke?",
    "vitamin d",
    "The kernel schedules threads on cores; a lock that is held across an interrupt stops all of them.",
    "In 1867 the company bought forty acres by the river, built two mills and a row of houses for the "
    "workers, and laid the first four miles of the line that would join the valley to the coast.",
    "def mean(values): return sum(values) / len(values)",
    "Patients were assigned at random to one of two groups. After twelve weeks the mean difference was 3.4 "
    "points (95% CI 1.2 to 5.6), and no serious adverse event was reported. We conclude that the treatment "
    "is safe, and that a larger trial with a longer follow-up is needed before it can be recommended.",
    "capital of Mongolia",
    "Boil the lentils until soft, add cumin, garlic and a spoon of lemon juice, and serve with rice.",
)
