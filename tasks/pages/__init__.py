"""What people look at: reports and pages, their words, figures and templates."""
