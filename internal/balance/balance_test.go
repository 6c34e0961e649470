package balance

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

// share counts which endpoints are chosen over one whole round of random numbers.
func share(lb mesh.LoadBalancing, source *mesh.Workload, endpoints []*mesh.Workload, round uint64) map[int]int {
	counts := map[int]int{}
	for random := range round {
		i, ok := Pick(lb, source, len(endpoints), func(i int) *mesh.Workload { return endpoints[i] }, random)
		if !ok {
			i = -1
		}
		counts[i]++
	}
	return counts
}

func TestPick(t *testing.T) {
	at := func(node, zone, region string) *mesh.Workload {
		return &mesh.Workload{Healthy: true, Node: node, Locality: mesh.Locality{Region: region, Zone: zone}}
	}
	sick := at("n1", "z1", "r1")
	sick.Healthy = false
	big := at("n9", "z9", "r9")
	big.Capacity = 3
	source := at("n1", "z1", "r1")
	here, zone, region, away := at("n1", "z1", "r1"), at("n2", "z1", "r1"), at("n3", "z2", "r1"), at("n4", "z1", "r2")
	near := []mesh.LocalityScope{mesh.ScopeRegion, mesh.ScopeZone, mesh.ScopeNode}
	for _, tc := range []struct {
		name      string
		lb        mesh.LoadBalancing
		source    *mesh.Workload
		endpoints []*mesh.Workload
		want      map[int]int
	}{
		{"nobody", mesh.LoadBalancing{}, source, nil, map[int]int{-1: 12}},
		{"evenly", mesh.LoadBalancing{}, source, []*mesh.Workload{here, zone, away}, map[int]int{0: 4, 1: 4, 2: 4}},
		{"by capacity", mesh.LoadBalancing{}, source, []*mesh.Workload{here, big}, map[int]int{0: 3, 1: 9}},
		{"not the ruled out", mesh.LoadBalancing{}, source, []*mesh.Workload{nil, here}, map[int]int{1: 12}},
		{"not the sick", mesh.LoadBalancing{}, source, []*mesh.Workload{sick, away}, map[int]int{1: 12}},
		{"only the sick", mesh.LoadBalancing{}, source, []*mesh.Workload{sick}, map[int]int{-1: 12}},
		{"the sick where wanted", mesh.LoadBalancing{AllowUnhealthy: true}, source, []*mesh.Workload{sick}, map[int]int{0: 12}},
		{"nearest first", mesh.LoadBalancing{Mode: mesh.LoadBalanceFailover, Preference: near}, source,
			[]*mesh.Workload{away, region, zone, here}, map[int]int{3: 12}},
		{"nearest left", mesh.LoadBalancing{Mode: mesh.LoadBalanceFailover, Preference: near}, source,
			[]*mesh.Workload{away, region, zone, sick}, map[int]int{2: 12}},
		{"same zone name in another region is far", mesh.LoadBalancing{Mode: mesh.LoadBalanceFailover, Preference: near}, source,
			[]*mesh.Workload{away, region}, map[int]int{1: 12}},
		{"far is better than none", mesh.LoadBalancing{Mode: mesh.LoadBalanceFailover, Preference: near}, source,
			[]*mesh.Workload{away}, map[int]int{0: 12}},
		{"strict", mesh.LoadBalancing{Mode: mesh.LoadBalanceStrict, Preference: near}, source,
			[]*mesh.Workload{away, region, zone}, map[int]int{-1: 12}},
		{"strict met", mesh.LoadBalancing{Mode: mesh.LoadBalanceStrict, Preference: near}, source,
			[]*mesh.Workload{away, here}, map[int]int{1: 12}},
		{"a source nobody knows is near to none", mesh.LoadBalancing{Mode: mesh.LoadBalanceStrict, Preference: near}, nil,
			[]*mesh.Workload{here}, map[int]int{-1: 12}},
		{"preference without a mode", mesh.LoadBalancing{Preference: near}, source, []*mesh.Workload{away, here}, map[int]int{0: 6, 1: 6}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if diff := cmp.Diff(tc.want, share(tc.lb, tc.source, tc.endpoints, 12)); diff != "" {
				t.Errorf("chosen (-want +got):\n%s", diff)
			}
		})
	}
}
