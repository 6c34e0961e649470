package ztunnel_test

import (
	"errors"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/fairlead-mesh/fairlead/internal/netns"
	"github.com/fairlead-mesh/fairlead/internal/zds"
)

// TestNetworkIsAskedWithinTheNode: what keeps NetworkPolicy sees no joined sockets, but it decides whether pods are joined.
// Its word is taken for a while, and for one pod: another may get the address.
func TestNetworkIsAskedWithinTheNode(t *testing.T) {
	for name, forgotten := range map[string]struct {
		env map[string]string
		by  func(*shop)
	}{
		"until it is old":          {map[string]string{"POOL_UNUSED_RELEASE_TIMEOUT": "2s"}, func(*shop) {}},
		"until the pod is another": {nil, (*shop).replaceNear},
	} {
		t.Run(name, func(t *testing.T) {
			s := newShop(t, forgotten.env)
			works := func() error {
				_, err := call(t, s.client.ns, s.near4)
				return err
			}
			fails := func() error {
				if works() == nil {
					return errors.New("answered")
				}
				return nil
			}
			s.forbidProxyPort(netlink.RuleAdd)
			s.eventually(fails, "the network says no")
			s.node1.line(t, map[string]any{"direction": "outbound", "path": "node", "response_flags": "CONNECT", "error": contains("ask the network")})
			s.forbidProxyPort(netlink.RuleDel)
			s.eventually(works, "the network says yes")
			s.forbidProxyPort(netlink.RuleAdd)
			if err := works(); err != nil && forgotten.env == nil {
				t.Errorf("asked again at once: %v", err)
			}
			forgotten.by(s)
			s.eventually(fails, "the network says no again")
		})
	}
}

// forbidProxyPort changes the rule that keeps the client's pod from others' proxy port.
func (s *shop) forbidProxyPort(change func(*netlink.Rule) error) {
	s.t.Helper()
	forbidden := netlink.NewRule()
	forbidden.Family, forbidden.Priority, forbidden.Type = unix.AF_INET, 1, unix.RTN_PROHIBIT
	forbidden.IPProto, forbidden.Dport = unix.IPPROTO_TCP, netlink.NewRulePortRange(15008, 15008)
	s.must(netns.Do(s.client.ns, func() error { return change(forbidden) }))
}

// replaceNear has the proxy serve another pod where near was.
func (s *shop) replaceNear() {
	s.t.Helper()
	s.must(s.node1.agent.Delete(s.t.Context(), "uid-"+s.near.name))
	s.must(s.node1.agent.Add(s.t.Context(), zds.Workload{UID: "uid-another", Name: s.near.name, Namespace: "shop", ServiceAccount: s.near.name, Netns: s.near.ns}))
}
