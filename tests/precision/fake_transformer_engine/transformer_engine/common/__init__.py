"""Recipes are here."""
