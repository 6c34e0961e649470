package cli

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func TestExclusions(t *testing.T) {
	pod := func(namespace, name string, annotations map[string]string) *corev1.Pod {
		return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Annotations: annotations}}
	}
	for line, want := range map[string]string{
		"exclusions -n shop": `NAMESPACE POD NAME CAPTURED LEFT OUT INVALID
shop db true inbound ports 5432 -
shop wrong false - annotation traffic.sidecar.istio.io/excludeOutboundPorts: "http" is not a port
`,
		"exclusions -A": `NAMESPACE POD NAME CAPTURED LEFT OUT INVALID
quiet any false DNS -
shop db true inbound ports 5432 -
shop wrong false - annotation traffic.sidecar.istio.io/excludeOutboundPorts: "http" is not a port
`,
	} {
		c := newCluster(
			&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "quiet", Annotations: map[string]string{"ambient.istio.io/dns-capture": "false"}}},
			pod("quiet", "any", nil), pod("shop", "plain", nil),
			pod("shop", "db", map[string]string{"traffic.sidecar.istio.io/excludeInboundPorts": "5432", "ambient.istio.io/redirection": "enabled"}),
			pod("shop", "wrong", map[string]string{"traffic.sidecar.istio.io/excludeOutboundPorts": "http"}),
		)
		out, err := c.run(t, line)
		if diff := cmp.Diff(want, lines(out)); diff != "" || err != nil {
			t.Errorf("%s: %v (-want +got):\n%s", line, err, diff)
		}
	}
}
