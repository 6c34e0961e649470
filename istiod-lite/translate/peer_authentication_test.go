package translate

import (
	"fmt"
	"strings"
	"testing"

	securityv1 "istio.io/client-go/pkg/apis/security/v1"
	corev1 "k8s.io/api/core/v1"

	"github.com/fairlead-mesh/fairlead/internal/kubedir"
)

// The pods of a case are asked, each, which policy they list.
func TestPeerAuthentication(t *testing.T) {
	goldens(t, "peer_authentication", func(t *testing.T, in *kubedir.Dir) string {
		byNamespace := map[string][]*securityv1.PeerAuthentication{}
		for _, pa := range list(t, in, &securityv1.PeerAuthentication{}) {
			byNamespace[pa.Namespace] = append(byNamespace[pa.Namespace], pa)
		}
		var b strings.Builder
		printed := map[string]bool{}
		for _, pod := range list(t, in, &corev1.Pod{}) {
			modes, policies := PeerAuthentication(testMesh, byNamespace[testMesh.RootNamespace], byNamespace[pod.Namespace])
			for _, p := range policies {
				if !printed[p.Key()] {
					printPolicy(&b, p, nil)
				}
				printed[p.Key()] = true
			}
			fmt.Fprintf(&b, "%s/%s lists %q\n", pod.Namespace, pod.Name, modes.Policy(pod.Labels))
		}
		return b.String()
	})
}

func TestStaticStrict(t *testing.T) {
	var b strings.Builder
	printPolicy(&b, StaticStrict(testMesh), nil)
	want := "DENY istio-system/istio_converted_static_strict selected by map[]\n  rule: (principal!=any)\n"
	if b.String() != want {
		t.Errorf("got %q, want %q", b.String(), want)
	}
}
