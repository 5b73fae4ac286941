"""What lies beyond the assignment, a room for each idea. Rooms import `llada_helpers` and each other; the helper imports none.

How to generate, how to score:

    decoding      guidance, a block cache (predictors around predictors); adaptive, late, spaced commits (strategies); revision
    likelihood    the bound taken apart and with less noise, any-order chains, log-likelihoods of answers
    exact         exact nats of a decoder, by passes and places: the sampler's own loop, told the true tokens
    blocks        block diffusion: from AR to LLaDA in one number, with an exact cache
    quality       one measure for all decoders: how good and how varied their texts are, and what they cost
    film          a generation as an animated picture
    page          the two models in one HTML file, to play with in a browser: python -m beyond.page

How to train, by suites of experiments:

    experiments   many trainings, one table: python -m beyond.experiments --help
    ablations     the recipe's choices, one study: losses, times, architectures, optimizers
    budget        what more training buys, and the best of both models
    crossover     little text, many epochs
    vocabulary    characters against byte pairs

What a trained model knows:

    dialogue      instruction tuning on the dialogue that the corpus is, who says it, guidance
    reversal      invented facts, told in one direction and asked in the other; the true text among four
    toy           the tutorials' five sentences, words as tokens

    report        the tables' numbers put into Markdown, and the Markdown set as a PDF
"""
