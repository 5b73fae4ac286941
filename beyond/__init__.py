"""What lies beyond the assignment, a room for each idea. Rooms import `llada_helpers` and each other; the helper imports none.

How to generate, how to score:

    decoding      guidance, a block cache (predictors around predictors); adaptive, late, spaced commits (strategies); revision
    likelihood    the bound with less noise, any-order chains, log-likelihoods of answers, choosing among them
    exact         exact nats of a decoder, by passes and places: the sampler's own loop, told the true tokens
    estimators    four other ways to draw the masks of the bound, to compare their noise
    quality       one measure for all decoders: how good and how varied their texts are, and what they cost
    film          a generation as an animated picture
    page          the two models in one HTML file, to play with in a browser: python -m beyond.page

How to train, by suites of experiments:

    experiments   many trainings, one table: python -m beyond.experiments --help
    ablations     one thing changed at a time
    losses        forms of Eq. 3 to compare with ours, and two that are no bound
    variants      a Transformer that is told the time, and one with learned positions
    schedule      where to draw t, and the noise of the gradient that explains it
    crossover     little text, many epochs
    vocabulary    characters against byte pairs
    tuning        the recipe with one of its choices changed
    budget        what more training buys
    blocks        block diffusion: from AR to LLaDA in one number, with an exact cache
    knob          what that number buys and costs: likelihood, texts, speed, blanks filled

What a trained model knows:

    anatomy       what a character costs by masking rate and by place, and how noisy the gradient is
    choosing      the true text among four
    dialogue      instruction tuning on the dialogue that the corpus is
    speakers      who says it, and guidance that tries to make it more so
    reversal      invented facts, told in one direction and asked in the other
    toy           the tutorials' five sentences, words as tokens

    report        the tables' numbers put into Markdown, and the Markdown set as a PDF
"""
