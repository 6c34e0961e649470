package cli

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	k8stesting "k8s.io/client-go/testing"
)

func TestZtunnelConfig(t *testing.T) {
	for line, want := range map[string]string{
		"ztunnel-config workloads": `NAMESPACE POD NAME ADDRESS NODE WAYPOINT PROTOCOL
legacy old 10.0.1.9 node1 None TCP
shop orders-1 10.0.2.2 node2 shop/waypoint.shop.svc.cluster.local HBONE
shop web-1 10.0.1.2,fd00::2 node1 None HBONE
`,
		"zc svc": `NAMESPACE SERVICE NAME SERVICE VIP WAYPOINT ENDPOINTS
legacy old - None 0
shop orders 10.96.0.7 shop/waypoint.shop.svc.cluster.local 1
`,
		"ztunnel-config policies -n shop": `NAMESPACE POLICY NAME ACTION SCOPE RULES DRY RUN
shop deny-batch Deny WorkloadSelector 1 false
`,
		"ztunnel-config certificates": `CERTIFICATE NAME TYPE STATUS VALID SERIAL NUMBER NOT AFTER NOT BEFORE
spiffe://cluster.local/ns/shop/sa/web Leaf Available true 11 2999-01-01T00:00:00Z 2020-01-01T00:00:00Z
spiffe://cluster.local/ns/shop/sa/web Intermediate Available true 12 2999-01-01T00:00:00Z 2020-01-01T00:00:00Z
spiffe://cluster.local/ns/shop/sa/web Root Available false 13 2021-01-01T00:00:00Z 2020-01-01T00:00:00Z
spiffe://cluster.local/ns/legacy/sa/old Leaf Initializing false - - -
`,
		"ztunnel-config connections": `WORKLOAD DIRECTION LOCAL REMOTE REMOTE TARGET PROTOCOL SENT RECEIVED AGE
web-1.shop Inbound 10.0.1.2:80 10.0.2.2 spiffe://cluster.local/ns/shop/sa/orders HBONE 5 7 1s
web-1.shop Outbound 10.0.1.2:41000 10.0.2.2:15008 10.96.0.7:80 HBONE 1 2 3s
`,
		"ztunnel-config policies -n legacy -o yaml": `- action: Allow
dryRun: true
name: later
namespace: legacy
rules: []
scope: Namespace
`,
		"ztunnel-config certificates -n legacy -o json": `[
{
"certChain": [],
"identity": "spiffe://cluster.local/ns/legacy/sa/old",
"state": "Initializing"
}
]
`,
		"ztunnel-config connections -n legacy -o yaml": `uid-2:
connections:
inbound: []
outbound: []
info:
name: old
namespace: legacy
state: Up
`,
		"ztunnel-config services -n nowhere -o json": "[]\n",
	} {
		c := newCluster(proxy("ztunnel-a", "node1", corev1.PodRunning))
		out, err := c.run(t, line)
		if err != nil {
			t.Errorf("%s: %v", line, err)
		}
		if diff := cmp.Diff(want, lines(out)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", line, diff)
		}
	}
}

// TestWhichProxyIsAsked: the one that is named, or one of the system namespace. Field selectors are the API server's to
// follow, which the fake one does not; that they are sent is what is looked at.
func TestWhichProxyIsAsked(t *testing.T) {
	for line, want := range map[string]struct{ asked, selector string }{
		"ztunnel-config workloads":                                   {"istio-system/ztunnel-a/config_dump", "status.phase=Running"},
		"ztunnel-config workloads --node node7":                      {"istio-system/ztunnel-a/config_dump", "spec.nodeName=node7,status.phase=Running"},
		"ztunnel-config workloads ztunnel-x":                         {"istio-system/ztunnel-x/config_dump", ""},
		"ztunnel-config workloads ztunnel-x --system-namespace mesh": {"mesh/ztunnel-x/config_dump", ""},
	} {
		c := newCluster(proxy("ztunnel-a", "node1", corev1.PodRunning))
		if _, err := c.run(t, line); err != nil {
			t.Errorf("%s: %v", line, err)
		}
		selector := ""
		for _, action := range c.kubernetes.Actions() {
			if list, ok := action.(interface {
				GetListRestrictions() k8stesting.ListRestrictions
			}); ok {
				selector = list.GetListRestrictions().Fields.String()
			}
		}
		if diff := cmp.Diff([]string{want.asked, want.selector}, []string{strings.Join(c.asked, " "), selector}); diff != "" {
			t.Errorf("%s (-want +got):\n%s", line, diff)
		}
	}
}
