"""From a user's file to a first recipe: ``look`` reads the file, ``draft`` writes the recipe."""
