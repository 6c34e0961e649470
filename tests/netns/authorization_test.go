package netns

import (
	"strings"
	"testing"
	"time"

	"github.com/fairlead-mesh/fairlead/tests/netns/lab"
)

const denyBatch = `apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {namespace: shop, name: deny-batch}
spec:
  selector: {matchLabels: {app: orders}}
  action: DENY
  rules:
  - from: [{source: {principals: [cluster.local/ns/shop/sa/batch]}}]
`

func TestDenyOneServiceAccount(t *testing.T) {
	f := newFixture(t, ambient)
	f.mustAnswer(f.batch, tcp(f.v1)) // the control

	// Two connections that live on: the policy must cut one of them.
	type held struct {
		name string
		lab.Answer
	}
	answers := make(chan held, 2)
	for _, p := range []*lab.Pod{f.web, f.batch} {
		go func() {
			c := tcp(f.v1)
			c.SameConnection, c.Duration, c.Interval = true, 3*time.Second, 20*time.Millisecond
			a, err := p.Call(f.ctx, c)
			if err != nil {
				t.Error(err)
			}
			answers <- held{p.Name, a}
		}()
	}
	time.Sleep(200 * time.Millisecond)

	f.must(f.Apply("deny-batch", denyBatch))
	f.until(f.batch, tcp(f.v1), lab.Answer.Failed)
	f.mustFail(f.batch, tcp6(f.v1))
	f.mustAnswer(f.batch, tcp(f.near))
	f.mustAnswer(f.web, tcp(f.v1))
	f.mustAnswer(f.legacy, tcp(f.v1))
	if !t.Failed() {
		time.Sleep(200 * time.Millisecond)
	}
	for range 2 {
		switch a := <-answers; a.name {
		case "web":
			if !a.OK() {
				t.Errorf("the live connection of a pod that the policy does not name: %s", a)
			}
		default:
			if a.OK() {
				t.Errorf("the live connection of the pod that the policy denies went on: %s", a)
			}
		}
	}
	o := f.observe(f.batch, tcp(f.v1), 2)
	if o.Inbound == nil || o.Inbound.Policy != "shop/deny-batch" || o.Wire.Markers != 0 {
		t.Errorf("the log says %+v, want the policy that denied; captured %+v", o.Inbound, o.Wire)
	}

	f.must(f.Delete("deny-batch"))
	f.until(f.batch, tcp(f.v1), lab.Answer.OK)
}

// TestSameNodeIsAuthorizedToo: two pods of one node meet without a tunnel, by the same rules.
func TestSameNodeIsAuthorizedToo(t *testing.T) {
	f := newFixture(t, ambient)
	f.mustAnswer(f.batch, tcp(f.near))
	f.must(f.Apply("deny-batch", strings.ReplaceAll(denyBatch, "app: orders", "app: near")))
	f.until(f.batch, tcp(f.near), lab.Answer.Failed)
	f.mustAnswer(f.web, tcp(f.near))
	f.mustAnswer(f.batch, tcp(f.v1))
}

const denyAll = `apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {namespace: shop, name: nobody}
spec: {}
`

const allowWeb = `apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {namespace: shop, name: allow-web}
spec:
  selector: {matchLabels: {app: orders}}
  action: ALLOW
  rules:
  - from: [{source: {principals: [cluster.local/ns/shop/sa/web]}}]
    to: [{operation: {ports: ["9090"]}}]
`

func TestDenyAllAndAllow(t *testing.T) {
	f := newFixture(t, ambient)
	f.mustAnswer(f.web, tcp(f.v1))
	f.must(f.Apply("nobody", denyAll))
	f.until(f.web, tcp(f.v1), lab.Answer.Failed)
	f.mustFail(f.web, tcp(f.near))
	f.mustFail(f.legacy, tcp(f.v1))
	f.must(f.Apply("allow-web", allowWeb))
	f.until(f.web, tcp(f.v1), lab.Answer.OK)
	f.mustFail(f.batch, tcp(f.v1))
	f.mustFail(f.web, tcp(f.near))
	f.mustFail(f.web, lab.Call{To: f.v1.Addr(lab.PortHTTP, false), HTTP: true})
}

// TestInvalidPolicy: a mistake is told to its author, and what was in force before stays.
func TestInvalidPolicy(t *testing.T) {
	f := newFixture(t, ambient)
	f.must(f.Apply("deny-batch", denyBatch))
	f.until(f.batch, tcp(f.v1), lab.Answer.Failed)
	broken := strings.ReplaceAll(denyBatch, "principals: [cluster.local/ns/shop/sa/batch]", "ipBlocks: [10.0.0.0/99]")
	f.must(f.Apply("deny-batch", broken))
	status := ""
	for deadline := time.Now().Add(3 * time.Second); !strings.Contains(status, "10.0.0.0/99"); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("no status condition names the mistake: %q", status)
		}
		var err error
		status, err = f.StatusOf("AuthorizationPolicy", shop, "deny-batch")
		f.must(err)
	}
	if !strings.Contains(status, "ZtunnelAccepted") || !strings.Contains(status, `"False"`) {
		t.Errorf("status: %s", status)
	}
	f.mustFail(f.batch, tcp(f.v1))
	f.mustAnswer(f.web, tcp(f.v1))
}
