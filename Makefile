# Every target is one script of hack/, so that it can be read and run by itself. `make help` lists them.
.DEFAULT_GOAL := help

demo: ## two nodes, a mesh and its proof on this machine, no Kubernetes needed
	hack/demo.sh
demo-down: ## removes what an interrupted demo left behind
	hack/demo.sh --down
test: ## every test: unit, real kernel, real cluster
	hack/test.sh
test-unit: ## tests that need no privileges
	hack/test.sh unit
test-netns: ## real-kernel tests in network namespaces (root)
	hack/test.sh netns
test-e2e: ## tests on a real two-node Kubernetes, brought up for them (root)
	hack/test.sh e2e
cluster-up: ## a real Kubernetes on this machine, two nodes
	hack/cluster.sh up
cluster-install: ## our images and chart onto that cluster, by Helm
	hack/cluster.sh install
cluster-down: ## takes the cluster away again
	hack/cluster.sh down
bench: ## benchmarks, side by side with the peers named by ENVOY and PEER_ZTUNNEL
	hack/bench.sh
	hack/bench.sh redirect
build: ## static binaries into bin/
	hack/build.sh
update: ## regenerates checked-in generated code and golden files
	hack/update.sh
verify: ## fails where generated code, formatting or vet differ
	hack/verify.sh
clean: ## removes bin/ and out/
	rm -rf bin out
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: demo demo-down test test-unit test-netns test-e2e cluster-up cluster-install cluster-down bench build update verify clean help
