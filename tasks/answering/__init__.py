"""How policy models are asked: endpoints, journals, local generation."""
