package e2e

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"
)

// split counts which version answers n requests.
func (w *world) split(t *testing.T, n int) map[string]int {
	t.Helper()
	out, err := command(3*time.Minute, nil, "kubectl", "-n", w.namespace, "exec", "alice", "--", "box", "client",
		"http://server/split", "-n", fmt.Sprint(n), "-concurrency", "4", "-summary")
	var sum struct {
		Errors   int
		Error    string
		Status   map[string]int
		Versions map[string]int
	}
	if jsonErr := json.Unmarshal([]byte(out), &sum); jsonErr != nil {
		t.Fatalf("summary %q: %v, %v", out, jsonErr, err)
	}
	if sum.Errors != 0 || sum.Status["200"] != n {
		t.Fatalf("of %d requests %d failed (%s), statuses %v", n, sum.Errors, sum.Error, sum.Status)
	}
	return sum.Versions
}

const splitRoute = `
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: split, namespace: %s}
spec:
  parentRefs: [{group: "", kind: Service, name: server, port: 80}]
  rules:
  - matches: [{path: {type: %s, value: %q}}]
    backendRefs: [{name: server-v1, port: 80, weight: 90}, {name: server-v2, port: 80, weight: 10}]
`

func TestWaypointSplitsAndAuthorizes(t *testing.T) {
	w := newWorld(t, "waypoint", "alice")
	w.join(t)
	apply(t, fmt.Sprintf(splitRoute, w.namespace, "PathPrefix", "/"))
	apply(t, fmt.Sprintf(`
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: read-only, namespace: %s}
spec:
  targetRefs: [{group: "", kind: Service, name: server}]
  action: DENY
  rules: [{to: [{operation: {methods: [POST]}}]}]
`, w.namespace))
	post := []string{"http://server/", "-method", "POST", "-d", "x", "-timeout", "3s"}
	if a := w.client(t, "alice", post...)[0]; !a.ok() {
		t.Fatalf("control: without a waypoint nobody reads the method: %v", a)
	}
	if v1 := w.split(t, 200)["v1"]; v1 > 170 {
		t.Fatalf("control: without a waypoint nobody splits, but v1 answered %d of 200", v1)
	}

	t.Log(fairlead(t, "waypoint", "apply", "-n", w.namespace, "--enroll-namespace", "--wait"))
	if out := fairlead(t, "waypoint", "list", "-n", w.namespace); !strings.Contains(out, "waypoint") {
		t.Errorf("waypoint list: %s", out)
	}
	eventually(t, 10*time.Second, "a POST is refused by the waypoint", func() error {
		a := w.client(t, "alice", post...)[0]
		if a.Status != 403 || !strings.Contains(a.Body, "RBAC: access denied") {
			return fmt.Errorf("got %v", a)
		}
		return nil
	})
	allOK(t, "GET through the waypoint", w.client(t, "alice", "http://server/", "-n", "20"))
	allOK(t, "HTTP/2 through the waypoint", w.client(t, "alice", "http://server/", "-n", "5", "-h2c"))
	got := w.split(t, 2000)
	if got["v1"] < 1740 || got["v1"] > 1860 { // 1800 ± 4.5 standard deviations
		t.Errorf("2000 requests by weight 90/10: %v", got)
	}

	// A route that cannot be used says so, and the one before it stays.
	apply(t, fmt.Sprintf(splitRoute, w.namespace, "RegularExpression", "/("))
	waitCondition(t, w.namespace, "httproute", "split", "Accepted", "False", "/(")
	got = w.split(t, 400)
	if got["v1"] < 320 {
		t.Errorf("after an invalid change 400 requests by weight 90/10: %v", got)
	}

	fairlead(t, "waypoint", "delete", "-n", w.namespace, "waypoint")
}
