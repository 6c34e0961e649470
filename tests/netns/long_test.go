package netns

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/fairlead-mesh/fairlead/tests/netns/lab"
)

// TestLongConnections: connections through a tunnel and on one node outlive their certificates, and a control plane that
// goes away and comes back.
func TestLongConnections(t *testing.T) {
	const life = 20 * time.Second
	f := newFixture(t, ambient)
	for _, n := range f.Nodes {
		n.ZtunnelEnv = []string{"SECRET_TTL=" + life.String()}
		f.must(n.StopZtunnel())
		f.must(n.StartZtunnel(f.ctx))
	}
	f.awaitTunnels()
	before := f.certificates(f.Nodes[0])
	answers := make(chan lab.Answer, 2)
	for _, to := range []*lab.Pod{f.v1, f.near} {
		go func() {
			c := tcp(to)
			c.SameConnection, c.Duration, c.Interval, c.Timeout = true, 2*life, 20*time.Millisecond, 5*time.Second
			a, err := f.web.Call(f.ctx, c)
			if err != nil {
				t.Error(err)
			}
			answers <- a
		}()
	}
	time.Sleep(life / 4)
	f.must(f.StopIstiod())
	time.Sleep(3 * time.Second)
	f.must(f.StartIstiod(f.ctx))
	for range 2 {
		a := <-answers
		if !a.OK() || len(a.Attempts) < 100 {
			t.Errorf("%d exchanges: %s", len(a.Attempts), a)
		}
	}
	if f.certificates(f.Nodes[0]) == before {
		t.Errorf("the certificates are those of %v ago", 2*life)
	}
	f.mustBeHBONE(f.web, f.v1, tcp(f.v1))
}

// certificates is what a ztunnel says of its certificates.
func (f *fixture) certificates(n *lab.Node) string {
	f.t.Helper()
	text, err := n.Get(f.ctx, 15000, "/config_dump")
	f.must(err)
	var dump struct {
		Certificates json.RawMessage `json:"certificates"`
	}
	f.must(json.Unmarshal([]byte(text), &dump))
	if len(dump.Certificates) < 100 {
		f.t.Fatalf("no certificates in %.300s", text)
	}
	return string(dump.Certificates)
}
