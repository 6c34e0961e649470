package netns

import (
	"testing"

	"github.com/fairlead-mesh/fairlead/tests/netns/lab"
)

const strict = `apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {namespace: shop, name: default}
spec:
  mtls: {mode: STRICT}
`

const strictExceptTCP = strict + `---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {namespace: shop, name: orders}
spec:
  selector: {matchLabels: {app: orders}}
  mtls: {mode: STRICT}
  portLevelMtls:
    9090: {mode: PERMISSIVE}
`

func TestStrictRefusesPodsOutsideTheMesh(t *testing.T) {
	f := newFixture(t, ambient)
	http := lab.Call{To: f.v1.Addr(lab.PortHTTP, false), HTTP: true}
	f.mustAnswer(f.legacy, tcp(f.v1)) // permissive is the default
	f.mustAnswer(f.legacy, http)
	f.mustSeeClient(f.legacy, tcp(f.v1))

	f.must(f.Apply("strict", strict))
	f.until(f.legacy, tcp(f.v1), lab.Answer.Failed)
	f.mustFail(f.legacy, tcp6(f.v1))
	f.mustFail(f.legacy, tcp(f.near))
	f.mustBeHBONE(f.web, f.v1, tcp(f.v1))
	f.mustAnswer(f.web, tcp(f.near))

	f.must(f.Apply("strict", strictExceptTCP))
	f.until(f.legacy, tcp(f.v1), lab.Answer.OK)
	f.mustFail(f.legacy, http)
	f.mustFail(f.legacy, tcp(f.near))

	f.must(f.Delete("strict"))
	f.until(f.legacy, tcp(f.near), lab.Answer.OK)
}

// TestProbesPass: the kubelet's probes reach a pod that refuses everybody else without an identity.
func TestProbesPass(t *testing.T) {
	f := newFixture(t, ambient)
	f.must(f.Apply("strict", strict))
	f.until(f.legacy, tcp(f.v1), lab.Answer.Failed)
	for _, v6 := range []bool{false, true} {
		probe := lab.Call{To: f.v1.Addr(lab.PortHTTP, v6), HTTP: true}
		a, err := f.Nodes[1].Call(f.ctx, lab.Kubelet, probe)
		f.must(err)
		if !a.OK() {
			t.Errorf("a probe of %s: %s", probe.To, a)
		}
		a, err = f.Nodes[1].Call(f.ctx, lab.HostProcess, probe)
		f.must(err)
		// nftables takes whoever is root on the node for the kubelet.
		if a.Failed() != (redirection() == ebpf) {
			t.Errorf("another program of the node, to %s: %s; it is not the kubelet", probe.To, a)
		}
	}
}
