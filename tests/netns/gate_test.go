package netns

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/fairlead-mesh/fairlead/tests/netns/lab"
)

// TestPodThatChangesItsRulesStaysInTheMesh: an application with CAP_NET_ADMIN takes away what redirects it. Nothing leaves in
// clear, it is counted, and repaired at once.
func TestPodThatChangesItsRulesStaysInTheMesh(t *testing.T) {
	f := newFixture(t, ambient)
	if redirection() != ebpf {
		t.Skip("redirection by nftables does not check what leaves pods")
	}
	f.mustBePlain(f.legacy, tcp(f.v1)) // the control: the wire is read
	before, err := f.Wire.Total()
	f.must(err)
	f.must(f.web.Do(removeRules))
	c := tcp(f.v1)
	c.Timeout = time.Second
	f.call(f.web, c) // dropped, or repaired already
	eventually(t, "the attempt is counted", func() error {
		text, err := f.Nodes[0].Get(f.ctx, 15014, "/metrics")
		if err == nil && (!strings.Contains(text, "fairlead_cni_bypass_attempts_total ") || strings.Contains(text, "fairlead_cni_bypass_attempts_total 0\n")) {
			err = errors.New("none")
		}
		return err
	})
	eventually(t, "the rules are back", func() error {
		if a := f.call(f.web, c); !a.OK() {
			return fmt.Errorf("a call: %s", a)
		}
		return nil
	})
	seen, err := f.Wire.Since(before)
	f.must(err)
	if seen.Markers != 0 || seen.Clear != 0 || seen.Tunnel == 0 {
		t.Errorf("captured %+v, want all in tunnels", seen)
	}
}

func removeRules() error {
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		rules, err := netlink.RuleList(family)
		if err != nil {
			return err
		}
		for _, r := range rules {
			if r.Mark == 0 {
				continue
			}
			if err := netlink.RuleDel(&r); err != nil {
				return err
			}
		}
	}
	return nil
}

// TestAgentAway: nobody can be asked. Pods of the mesh wait, and those that are known to be outside do not.
func TestAgentAway(t *testing.T) {
	f := newFixture(t, ambient)
	eventually(t, "the node's record is written", func() error { return f.Nodes[0].HasRecord(shop) })
	f.Nodes[0].KillAgent()
	if p, err := f.Pod(f.ctx, lab.PodSpec{Namespace: shop, Name: "early"}); err == nil {
		t.Errorf("CNI ADD of pod %s succeeded without an agent", p.Name)
	}
	other := f.pod(lab.PodSpec{Namespace: outside, Name: "other"})
	f.mustAnswer(other, tcp(f.legacy))
	f.mustBeHBONE(f.web, f.v1, tcp(f.v1))
	f.must(f.Nodes[0].StartAgent(f.ctx))
	f.until(f.pod(lab.PodSpec{Namespace: shop, Name: "late"}), tcp(f.v1), lab.Answer.OK)
}

// TestConfigurationRewritten: another tool writes the node's CNI configuration without the mesh's plugin. The plugin is back
// at once; and a pod that was started without it, here because there was no agent either, is found and captured.
func TestConfigurationRewritten(t *testing.T) {
	f := newFixture(t, ambient)
	n := f.Nodes[0]
	f.must(n.RewriteCNI())
	eventually(t, "the plugin is back", n.HasPlugin)

	n.KillAgent()
	f.must(n.RewriteCNI())
	slipped := f.pod(lab.PodSpec{Namespace: shop, Name: "slipped"})
	f.mustBePlain(slipped, tcp(f.v1)) // the control
	f.must(n.StartAgent(f.ctx))
	eventually(t, "the plugin is back after the agent's return", n.HasPlugin)
	f.awaitEnrolled(slipped, true)
	f.until(slipped, tcp(f.v1), lab.Answer.OK)
	f.mustBeHBONE(slipped, f.v1, tcp(f.v1))
}

// eventually waits for a condition of the node, for which machine load may take seconds.
func eventually(t *testing.T, what string, check func() error) {
	t.Helper()
	var err error
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if err = check(); err == nil {
			return
		}
	}
	t.Fatalf("not within 10 s: %s: %v", what, err)
}
