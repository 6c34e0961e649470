package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// TestExclusionByAnnotation: what a running pod's annotation leaves out goes in clear, is shown by the command line, and is
// back in the mesh when the annotation is gone.
func TestExclusionByAnnotation(t *testing.T) {
	const annotation = "traffic.sidecar.istio.io/excludeOutboundPorts"
	w := newWorld(t, "exclusion", "alice")
	w.join(t)
	got, readable, hbone := w.observe(t, "alice")
	allOK(t, "in the mesh", got)
	if readable != 0 || hbone == 0 {
		t.Fatalf("control: without the annotation readable %d times, %d HBONE packets", readable, hbone)
	}
	seen := func(excluded bool) {
		t.Helper()
		eventually(t, 20*time.Second, fmt.Sprintf("port 80 is left out: %v", excluded), func() error {
			got, readable, hbone := w.observe(t, "alice")
			allOK(t, "while the annotation changes", got)
			if (readable > 0 && hbone == 0) != excluded || (readable == 0 && hbone > 0) == excluded {
				return fmt.Errorf("readable %d times, %d HBONE packets", readable, hbone)
			}
			return nil
		})
		if out := fairlead(t, "exclusions", "-n", w.namespace); strings.Contains(out, "alice") != excluded {
			t.Errorf("fairlead exclusions: %s", out)
		}
	}
	kubectl(t, "-n", w.namespace, "annotate", "pod", "alice", annotation+"=80")
	seen(true)
	kubectl(t, "-n", w.namespace, "annotate", "pod", "alice", annotation+"-")
	seen(false)
}

// TestNamesAreAnsweredWithoutAResolver: a pod asks an address where no resolver is; in the mesh its proxy answers, from that
// address, by UDP and by TCP, unless the pod's annotation says otherwise.
func TestNamesAreAnsweredWithoutAResolver(t *testing.T) {
	w := newWorld(t, "names", "alice")
	service := kubectl(t, "-n", w.namespace, "get", "service", "server", "-o", "jsonpath={.spec.clusterIP}")
	answered := func(network string) error {
		out, err := command(time.Minute, nil, "kubectl", "-n", w.namespace, "exec", "alice", "--", "box", "lookup", "-server", "192.0.2.53:53",
			"-network", network, "-timeout", "2s", "server."+w.namespace+".svc.cluster.local.")
		if err == nil && !strings.Contains(out, `"`+service+`"`) {
			err = fmt.Errorf("answered %q, want %s", out, service)
		}
		return err
	}
	if answered("udp") == nil || answered("tcp") == nil {
		t.Fatal("control: outside the mesh somebody answers")
	}
	w.join(t)
	for _, network := range []string{"udp", "tcp"} {
		eventually(t, 20*time.Second, "names are answered by "+network, func() error { return answered(network) })
	}
	kubectl(t, "-n", w.namespace, "annotate", "pod", "alice", "ambient.istio.io/dns-capture=false")
	eventually(t, 20*time.Second, "names are left alone", func() error {
		if err := answered("udp"); err == nil {
			return fmt.Errorf("they are answered")
		}
		return nil
	})
}
