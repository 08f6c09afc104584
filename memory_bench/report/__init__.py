"""From records to boards, tables, plots and pages; loads no model."""
