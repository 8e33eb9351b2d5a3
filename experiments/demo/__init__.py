"""A page to try methods on one image: masks, answers and costs that follow a slider."""
