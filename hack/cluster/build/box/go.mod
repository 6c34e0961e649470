module github.com/fairlead-mesh/fairlead/hack/cluster/build/box

go 1.26.0
