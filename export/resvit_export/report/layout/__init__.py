"""How the report looks: wording, drawings, pictures, template."""
