package netns

import (
	"testing"

	"github.com/fairlead-mesh/fairlead/tests/netns/lab"
)

// TestExclusions: what annotations leave out goes in clear, and nothing else does. The pods without them are the control.
func TestExclusions(t *testing.T) {
	f := newFixture(t, ambient)
	const traffic = "traffic.sidecar.istio.io/"
	out := f.pod(lab.PodSpec{Namespace: shop, Name: "out", Annotations: map[string]string{traffic + "excludeOutboundPorts": "9090"}})
	in := f.pod(lab.PodSpec{Namespace: shop, Name: "in", Node: 1, Annotations: map[string]string{traffic + "excludeInboundPorts": "9090"}})
	wrong := f.pod(lab.PodSpec{Namespace: shop, Name: "wrong", Annotations: map[string]string{traffic + "excludeOutboundPorts": "9090,http"}})
	f.until(f.web, tcp(in), lab.Answer.OK)
	f.until(wrong, tcp(f.v1), lab.Answer.OK)
	http := func(to *lab.Pod) lab.Call { return lab.Call{To: to.Addr(lab.PortHTTP, false), HTTP: true} }
	f.until(out, http(f.v1), lab.Answer.OK)

	f.mustBeHBONE(f.web, f.v1, tcp(f.v1))
	f.mustBePlain(out, tcp(f.v1))
	f.mustBePlain(out, tcp6(f.v1))
	f.mustBeHBONE(wrong, f.v1, tcp(f.v1))

	// Plaintext reaches the excluded port past the policy; the mesh's own pods go on through the tunnel.
	f.mustAnswer(f.legacy, tcp(f.v1))
	f.must(f.Apply("strict", strict))
	f.until(f.legacy, tcp(f.v1), lab.Answer.Failed)
	f.mustAnswer(f.legacy, tcp(in))
	f.mustFail(f.legacy, http(in))
	f.mustBeHBONE(f.web, in, tcp(in))
	f.mustFail(out, tcp(f.v1))

	// A change of the annotation is in force without a restart.
	f.must(in.Annotate(nil))
	f.until(f.legacy, tcp(in), lab.Answer.Failed)
	f.mustBeHBONE(f.web, in, tcp(in))
}
