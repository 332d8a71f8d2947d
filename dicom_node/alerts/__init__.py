"""Who has to look now, and how people and systems are told: HL7 v2, webhook, e-mail, UPS."""
