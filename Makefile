# Every command of the project; README, hooks and CI call these.
.DEFAULT_GOAL := help
SHELL := /bin/bash

help: ## print this
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16
.PHONY: help
