package netns

import (
	"testing"

	"github.com/fairlead-mesh/fairlead/tests/netns/lab"
)

// TestNamesOfTheMesh: pods of the mesh reach services by their names though no resolver answers, by short names too;
// others do not.
func TestNamesOfTheMesh(t *testing.T) {
	f := newFixture(t, ambient)
	for _, name := range []string{"orders", "orders.shop", "orders.shop.svc.cluster.local", "orders.shop.svc.cluster.local."} {
		call := lab.Call{To: name + ":9090", Size: 50_000}
		f.until(f.web, call, lab.Answer.OK)
		f.mustFail(f.legacy, call) // the control
	}
	f.mustBeHBONE(f.web, f.v1, lab.Call{To: "orders:9090", Size: 50_000})

	asks := f.pod(lab.PodSpec{Namespace: shop, Name: "asks-itself", Annotations: map[string]string{"ambient.istio.io/dns-capture": "false"}})
	f.until(asks, tcp(f.v1), lab.Answer.OK)
	f.mustFail(asks, lab.Call{To: "orders:9090"})

	f.Nodes[0].KillZtunnel()
	f.mustFail(f.web, lab.Call{To: "orders:9090"})
	f.must(f.Nodes[0].StartZtunnel(f.ctx))
	f.until(f.web, lab.Call{To: "orders:9090"}, lab.Answer.OK)
}
